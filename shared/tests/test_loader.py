"""Batches: in order, the same with worker processes, and never an image in another's place."""

import multiprocessing

import numpy as np
import pytest
import torch
from ood_core.backbones.transform import ImageTransform
from ood_core.data import ImageFolder, ParquetImages, PILImages, load_batches
from ood_core.errors import ImageError, UsageError
from PIL import Image

TRANSFORM = ImageTransform(crop=(8, 8), resize=8)


@pytest.fixture
def folder(tmp_path):
    """Eleven images, of which number 3 and 7 are broken."""
    rng = np.random.default_rng(0)
    for number in range(11):
        image = Image.fromarray(rng.integers(0, 256, (12, 9 + number, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number:02d}.png")
    for number in (3, 7):
        path = tmp_path / f"{number:02d}.png"
        path.write_bytes(path.read_bytes()[:80])
    return ImageFolder(tmp_path)


def collect(batches):
    return [(batch.indices.tolist(), batch.pixels, batch.failures) for batch in batches]


def test_batches_hold_the_decodable_images_in_order(folder):
    batches = collect(load_batches(folder, TRANSFORM, batch_size=4, on_error="record"))
    assert [indices for indices, _, _ in batches] == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert [[index for index, _ in failures] for _, _, failures in batches] == [[3], [7], []]
    assert "03.png" in batches[0][2][0][1]
    for indices, pixels, _ in batches:
        expected = torch.stack([TRANSFORM(folder.open(index)) for index in indices])
        assert pixels.dtype == torch.float32
        assert torch.equal(pixels, expected)


def test_workers_change_nothing(folder):
    torch.manual_seed(0)
    alone = collect(load_batches(folder, TRANSFORM, batch_size=3, on_error="record"))
    state = torch.get_rng_state()
    together = collect(load_batches(folder, TRANSFORM, batch_size=3, on_error="record", workers=2))
    assert [(i, f) for i, _, f in alone] == [(i, f) for i, _, f in together]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(alone, together, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not multiprocessing.active_children()


def test_workers_read_a_parquet_pack(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = []
    for value in range(7):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"image": encoded}), tmp_path / "pack.parquet")
    plain = ImageTransform(crop=(8, 8), resize=8, mean=(0, 0, 0), std=(1 / 255,) * 3)
    source = ParquetImages(tmp_path / "pack.parquet")
    batches = list(load_batches(source, plain, batch_size=2, workers=2))
    assert torch.cat([batch.pixels for batch in batches])[:, 0, 0, 0].tolist() == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_names_the_file(folder, workers):
    batches = load_batches(folder, TRANSFORM, batch_size=2, workers=workers)
    assert next(batches).indices.tolist() == [0, 1]
    with pytest.raises(ImageError, match=r"^Image '.*03\.png' cannot be read: .*on_error='record'"):
        list(batches)
    assert not multiprocessing.active_children()


def test_a_chunk_of_failures_has_no_pixels(folder):
    (batch,) = load_batches(folder, TRANSFORM, batch_size=2, indices=[3, 7], on_error="record")
    assert (batch.indices.tolist(), list(batch.pixels.shape), len(batch.failures)) == ([], [0, 3, 0, 0], 2)


def test_chosen_images_in_the_order_wanted(folder):
    batches = load_batches(folder, TRANSFORM, batch_size=2, indices=np.array([10, 0, 5]))
    assert [batch.indices.tolist() for batch in batches] == [[10, 0], [5]]
    batches = load_batches(folder, TRANSFORM, [[2], [9, 8, 1]])
    assert [batch.indices.tolist() for batch in batches] == [[2], [9, 8, 1]]


def test_max_pixels_makes_larger_images_failures(folder):
    limits = {"on_error": "record", "max_pixels": 12 * 12}
    (batch,) = load_batches(folder, TRANSFORM, batch_size=20, **limits)
    assert batch.indices.tolist() == [0, 1, 2]
    assert "max_pixels is 144" in batch.failures[-1][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_images_are_noted(tmp_path, workers):
    rng = np.random.default_rng(0)
    pictures = {
        "a": rng.integers(0, 256, (9, 9, 3), dtype=np.uint8),
        "b": np.full((9, 9, 3), 7, np.uint8),
        "c": rng.integers(0, 4096, (9, 9)).astype(np.uint16),
        "d": np.zeros((9, 9), np.uint16),
        "e": np.where(np.eye(9, dtype=bool)[::-1], 9, 7).astype(np.uint8),
    }
    for name, values in pictures.items():
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    batches = list(load_batches(ImageFolder(tmp_path), TRANSFORM, batch_size=2, workers=workers))
    notes = [note for batch in batches for note in batch.notes]
    assert notes == [(1, "constant"), (2, f"narrow:{pictures['c'].max()}"), (3, "constant")]


def test_wrong_arguments_are_refused_before_the_first_batch(folder):
    with pytest.raises(UsageError, match=r"'skip'.*raise, record"):
        load_batches(folder, TRANSFORM, batch_size=2, on_error="skip")
    with pytest.raises(UsageError, match="batch_size=0"):
        load_batches(folder, TRANSFORM, batch_size=0)
    with pytest.raises(UsageError, match="workers=-1"):
        load_batches(folder, TRANSFORM, batch_size=1, workers=-1)


def test_an_interrupt_passes_through_and_ends_the_workers(folder):
    def interrupt(image):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(load_batches(folder, interrupt, batch_size=2, on_error="record"))

    def consume():
        for _ in load_batches(folder, TRANSFORM, batch_size=1, workers=2, on_error="record"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        consume()
    del caught
    assert not multiprocessing.active_children()


def test_other_errors_of_the_transform_are_not_recorded(folder):
    def broken(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        next(load_batches(folder, broken, batch_size=2, on_error="record"))


@pytest.mark.parametrize(
    ("terminal", "progress", "shown"),
    [(False, None, False), (False, True, True), (True, None, True), (True, False, False)],
)
def test_the_bar_is_on_stderr_of_a_terminal_or_where_asked_for(capsys, monkeypatch, terminal, progress, shown):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    source = PILImages([Image.new("RGB", (8, 8))] * 3)
    assert len(list(load_batches(source, TRANSFORM, batch_size=2, progress=progress))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert ("100%" in err) is shown
