"""Extraction: the same features with and without a cache, after a kill, and never from damaged bytes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from ood_core import features as module
from ood_core.data import ImageFolder, scenes
from ood_core.errors import DataError, ImageError, UsageError
from ood_core.features import FeatureSet, extract
from PIL import Image


@pytest.fixture
def shards_of_six(monkeypatch):
    monkeypatch.setattr(module, "_SHARD", 6)


def equal(a, b):
    same = a.ids == b.ids and a.failures == b.failures and torch.equal(a.labels, b.labels)
    return same and all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("image", "local"))


def test_features_are_those_of_the_backbone(small_backbone, image_folder):
    source = ImageFolder(image_folder)
    found = extract(small_backbone, source, batch_size=7)
    pixels = torch.stack([small_backbone.transform(source.open(i)) for i in range(len(source))])
    image, local = small_backbone.encode_dense(pixels)
    torch.testing.assert_close(found.image, image, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.local, local, rtol=1e-5, atol=1e-6)
    assert found.ids == source.ids
    assert found.labels.tolist() == source.labels.tolist()
    assert (found.grid, found.fingerprint) == ((4, 4), small_backbone.fingerprint)
    torch.testing.assert_close(found.local.norm(dim=-1), torch.ones(20, 16))


def test_cached_equals_fresh_and_is_used(small_backbone, image_folder, tmp_path, shards_of_six, monkeypatch):
    fresh = extract(small_backbone, image_folder, batch_size=4)
    assert equal(extract(small_backbone, image_folder, cache=tmp_path, batch_size=4), fresh)
    monkeypatch.setattr(type(small_backbone), "encode", lambda *_, **__: pytest.fail("the cache was not used"))
    assert equal(extract(small_backbone, image_folder, cache=tmp_path, batch_size=4), fresh)


def test_an_interrupted_run_resumes_bit_identically(small_backbone, image_folder, tmp_path, shards_of_six, monkeypatch):
    whole = extract(small_backbone, image_folder, cache=tmp_path / "whole", batch_size=4)
    encode, calls = type(small_backbone).encode, []

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, *args, **options)

    monkeypatch.setattr(type(small_backbone), "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        extract(small_backbone, image_folder, cache=tmp_path / "cut", batch_size=4)
    calls[:] = [0] * 10
    resumed = extract(small_backbone, image_folder, cache=tmp_path / "cut", batch_size=4)
    assert equal(resumed, whole)
    assert len(calls) - 10 == 5  # of 7 batches the 2 of the finished shard were not computed again
    files = {p.name: p.read_bytes() for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "cut").rglob("*") if p.is_file()}


@pytest.mark.slow
def test_kill_minus_nine_then_resume(tmp_path):
    """A real process killed in the middle, at two points in time."""
    folder = scenes.write_folder(scenes.render(scenes.ID_CLASSES, 40, size=64), tmp_path / "images")
    script = textwrap.dedent("""
        import sys
        from ood_core import create_backbone, extract, features
        features._SHARD = 32
        backbone = create_backbone("tiny", dtype="float32")
        print("ready", flush=True)
        extract(backbone, sys.argv[1], cache=sys.argv[2], batch_size=16)
    """)

    def run(cache, kill_after=None):
        command = [sys.executable, "-c", script, str(folder), str(cache)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            if kill_after is not None:
                time.sleep(kill_after)
                os.kill(process.pid, signal.SIGKILL)
        return process.returncode

    def content(cache):
        return {p.name: p.read_bytes() for p in cache.rglob("*") if p.is_file() and not p.name.startswith(".")}

    assert run(tmp_path / "whole") == 0
    assert -signal.SIGKILL in [run(tmp_path / "cut", kill_after=delay) for delay in (0.1, 0.3)]
    assert run(tmp_path / "cut") == 0
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_damaged_shards_are_computed_again(small_backbone, image_folder, tmp_path, shards_of_six, caplog):
    fresh = extract(small_backbone, image_folder, cache=tmp_path, batch_size=4)
    first, second, third, _ = sorted(tmp_path.rglob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    first.write_bytes(data)
    second.write_bytes(b"")
    third.unlink()
    assert equal(extract(small_backbone, image_folder, cache=tmp_path, batch_size=4), fresh)
    assert "does not match its checksum" in caplog.text
    assert first.read_bytes() != bytes(data)


def test_a_damaged_manifest_loses_nothing_but_time(small_backbone, image_folder, tmp_path, shards_of_six):
    fresh = extract(small_backbone, image_folder, cache=tmp_path, batch_size=4)
    (manifest,) = tmp_path.rglob("manifest.json")
    for damage in ('{"shards": {"0"', '{"shards": {"0": {"sha256": 1}}}', "[]", '{"shards": {"0": []}}'):
        manifest.write_text(damage)
        assert equal(extract(small_backbone, image_folder, cache=tmp_path, batch_size=4), fresh)


def test_the_key_holds_everything_features_depend_on(small_backbone, image_folder, tmp_path):
    def keys():
        return {path.parent.name for path in tmp_path.rglob("manifest.json")}

    extract(small_backbone, image_folder, cache=tmp_path)
    assert len(keys()) == 1
    extract(small_backbone, image_folder, cache=tmp_path, needs={"image"})
    extract(small_backbone, image_folder, cache=tmp_path, local="tokens")
    assert len(keys()) == 3
    linear = small_backbone.linear("visual.1.up")
    with linear.edited(linear.weight * 0.5):
        extract(small_backbone, image_folder, cache=tmp_path)
    assert len(keys()) == 4
    extract(small_backbone, ImageFolder(image_folder).subset(range(10)), cache=tmp_path)
    assert len(keys()) == 5
    described = json.loads(next(tmp_path.rglob("manifest.json")).read_text())["description"]
    assert {"fingerprint", "transform", "needs", "dtype", "source"} <= set(described)


def test_bad_images_are_recorded_or_raised(small_backbone, tmp_path, shards_of_six):
    folder = scenes.write_folder(scenes.render(["brick circle"], 14, size=32), tmp_path / "images")
    broken = folder / "brick circle" / "00007.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ImageError, match="00007"):
        extract(small_backbone, folder)
    recorded = extract(small_backbone, folder, on_error="record", cache=tmp_path / "cache")
    assert len(recorded) == 13
    assert [name for name, _ in recorded.failures] == ["brick circle/00007.png"]
    assert "brick circle/00007.png" not in recorded.ids
    again = extract(small_backbone, folder, on_error="record", cache=tmp_path / "cache")
    assert equal(again, recorded)
    with pytest.raises(ImageError, match="00007"):
        extract(small_backbone, folder, cache=tmp_path / "cache")


def test_a_whole_shard_of_bad_images(small_backbone, tmp_path, shards_of_six):
    folder = scenes.write_folder(scenes.render(["brick circle"], 14, size=32), tmp_path / "images")
    for index in range(6, 12):
        (folder / "brick circle" / f"{index:05d}.png").write_bytes(b"<html>")
    for _ in range(2):
        found = extract(small_backbone, folder, on_error="record", cache=tmp_path / "cache")
        assert len(found) == 8
        assert len(found.failures) == 6
    for path in (folder / "brick circle").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="None of 14 images"):
        extract(small_backbone, folder, on_error="record")


def test_workers_give_the_same_features(small_backbone, image_folder):
    assert equal(extract(small_backbone, image_folder, workers=2), extract(small_backbone, image_folder))


def test_bad_arguments(small_backbone, image_folder):
    with pytest.raises(UsageError, match="on_error='skip'"):
        extract(small_backbone, image_folder, on_error="skip")
    with pytest.raises(UsageError, match="batch_size=0"):
        extract(small_backbone, image_folder, batch_size=0)
    with pytest.raises(UsageError, match="Unknown feature 'patches'"):
        extract(small_backbone, image_folder, needs={"patches"})
    with pytest.raises(UsageError, match="has no 'logits'"):
        extract(small_backbone, image_folder, needs={"logits"})


def test_rows_of_a_feature_set(clustered):
    whole = clustered()
    for index, ids in ((slice(2, 5), [2, 3, 4]), ([5, 1], [5, 1]), (whole.labels == 2, list(range(80, 120)))):
        part = whole[index]
        assert part.ids == [whole.ids[i] for i in ids]
        assert torch.equal(part.image, whole.image[ids])
        assert torch.equal(part.labels, whole.labels[ids])
    with pytest.raises(TypeError, match=r"features\[3:4\]"):
        whole[3]
    with pytest.raises(IndexError):
        whole[[500]]
    with pytest.raises(ValueError, match="image has 2 rows for 3 ids"):
        FeatureSet(ids=["a", "b", "c"], image=torch.eye(2))


def _with_mean(backbone, key="mean"):
    return backbone.with_features(["mean"], lambda x: {"mean": x.mean((2, 3)).half()}, key)


def test_features_of_a_method_are_extracted_cached_and_indexed_as_the_others(small_backbone, tmp_path):
    images = [Image.new("RGB", (64, 64), (20 * i, 0, 0)) for i in range(7)]
    wide = _with_mean(small_backbone)
    first = extract(wide, images, {"image", "mean"}, cache=tmp_path, batch_size=3)
    again = extract(wide, images, {"image", "mean"}, cache=tmp_path, batch_size=3)
    pixels = torch.stack([small_backbone.transform(image) for image in images])
    assert torch.equal(first.extra["mean"], pixels.mean((2, 3)).half())
    assert torch.equal(first.get("mean"), again.get("mean"))
    assert first.get("local") is None
    assert torch.equal(first.image, extract(small_backbone, images, {"image"}, batch_size=3).image)
    assert torch.equal(first[[5, 2]].extra["mean"], first.extra["mean"][[5, 2]])
    assert torch.equal(first[2:4].get("mean"), first.extra["mean"][2:4])
    joined = type(first).concatenate([first[:3], first[3:]])
    assert torch.equal(joined.get("mean"), first.get("mean"))
    assert joined.ids == first.ids


def test_a_feature_of_a_method_belongs_to_the_fingerprint_and_to_its_backbone_alone(small_backbone):
    wide = _with_mean(small_backbone)
    assert len({small_backbone.fingerprint, wide.fingerprint, _with_mean(small_backbone, "other").fingerprint}) == 3
    assert wide.model is small_backbone.model
    with pytest.raises(UsageError, match="'mean'"):
        small_backbone.encode(torch.zeros(1, 3, *small_backbone.transform.crop), {"mean"})
    with pytest.raises(ValueError, match="already"):
        _with_mean(wide)
    with pytest.raises(ValueError, match="'image' already"):
        small_backbone.with_features(["image"], lambda x: {}, "x")
    assert set(wide.encode(torch.zeros(1, 3, *small_backbone.transform.crop), {"mean"})) == {"mean"}


# ---- how images are read, and what is odd about them


@pytest.fixture
def odd_folder(tmp_path):
    """Two ordinary 16-bit images of 12-bit content, a constant one, a large one and a file that is skipped."""
    rng = np.random.default_rng(0)
    root = tmp_path / "odd"
    root.mkdir()
    for name in ("a", "b"):
        words = rng.integers(0, 4096, (40, 40)).astype(np.uint16)
        words[0, 0] = 4095
        Image.fromarray(words).save(root / f"{name}.png")
    Image.new("RGB", (40, 40), "red").save(root / "c.png")
    Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(root / "d.png")
    (root / "e.heic").write_bytes(b"")
    return root


def test_odd_images_and_skipped_files_are_told_once_and_counted(small_backbone, odd_folder, tmp_path, caplog):
    source = ImageFolder(odd_folder)
    for _ in range(2):  # the second is read from the cache
        found = extract(small_backbone, source, cache=tmp_path / "cache")
        assert found.notes == [("a.png", "narrow:4095"), ("b.png", "narrow:4095"), ("c.png", "constant")]
        assert module.count_notes(found.notes) == {"constant": 1, "narrow": 2}
    assert found[1:3].notes == [("b.png", "narrow:4095"), ("c.png", "constant")]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert "1 of 4 images are of one colour, first 'c.png'" in messages[0]
    assert "2 of 4 images have 16 bits per sample but no value above 4095, first 'a.png'" in messages[1]
    assert "value_range=(0, 4095)" in messages[1]
    assert "cannot be read here: 1 (.heic)" in messages[2]
    assert "'e.heic'" in messages[2]
    caplog.clear()
    extract(small_backbone, ImageFolder(odd_folder), cache=tmp_path / "cache")
    assert len(caplog.records) == 3  # another source, from the cache alone


def test_ordinary_images_are_not_spoken_of(small_backbone, image_folder, caplog):
    assert extract(small_backbone, image_folder).notes == []
    assert not caplog.records


def test_a_value_range_changes_pixels_and_the_key_of_the_cache(small_backbone, odd_folder, tmp_path, caplog):
    plain = extract(small_backbone, odd_folder, cache=tmp_path / "cache")
    ranged = extract(small_backbone, odd_folder, cache=tmp_path / "cache", value_range=(0, 4095))
    assert not torch.allclose(plain.image[:2], ranged.image[:2])
    assert torch.equal(plain.image[2:], ranged.image[2:])  # 8 bits do not heed it
    assert (plain.source != ranged.source, len(list((tmp_path / "cache").iterdir()))) == (True, 2)
    again = extract(small_backbone, ImageFolder(odd_folder, value_range=(0, 4095)), cache=tmp_path / "cache")
    assert torch.equal(again.image, ranged.image)
    assert again.source == ranged.source


def test_a_limit_of_pixels_is_an_option_that_a_cache_heeds(small_backbone, odd_folder, tmp_path, caplog):
    few = extract(small_backbone, odd_folder, cache=tmp_path, on_error="record", max_pixels=2000)
    assert few.failures[0][0] == "d.png"
    assert "60 x 60 pixels and max_pixels is 2000" in few.failures[0][1]
    assert len(extract(small_backbone, odd_folder, cache=tmp_path, on_error="record")) == 4
    with pytest.raises(ImageError, match="max_pixels is 2000"):
        extract(small_backbone, odd_folder, max_pixels=2000)
    with pytest.raises(UsageError, match="max_pixels=0"):
        extract(small_backbone, odd_folder, max_pixels=0)
