"""DICOM: stored values become the grey that the standard asks for, and every flaw of a file is a recorded failure."""

import io
import math
import sys
import warnings

import numpy as np
import pytest
from ood_core.data import ImageFolder, ParquetImages, decode, load_batches, open_source
from ood_core.data.decode import image_suffixes
from ood_core.errors import DataError, ImageError
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="the extra 'dicom' is not installed")
from pydicom import uid  # noqa: E402

RNG = np.random.default_rng(0)


def encoded(values, *, frames=None, syntax=uid.ExplicitVRLittleEndian, drop=(), **elements):
    """A DICOM file of an array [H, W], [H, W, 3], or with a leading axis of `frames`."""
    shape = values.shape[1:] if frames else values.shape
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    data = pydicom.Dataset()
    data.file_meta = meta
    data.Rows, data.Columns = shape[:2]
    data.SamplesPerPixel = 3 if len(shape) == 3 else 1
    data.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if len(shape) == 3:
        data.PlanarConfiguration = 0
    if frames:
        data.NumberOfFrames = frames
    data.BitsAllocated = data.BitsStored = 8 * values.itemsize
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    data["PixelData"].VR = "OB" if values.itemsize == 1 else "OW"
    for name, value in elements.items():
        if isinstance(value, pydicom.DataElement):
            data.add(value)
        else:
            setattr(data, name, value)
    data.HighBit = data.BitsStored - 1
    for name in drop:
        delattr(data, name)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, data, enforce_file_format=True)
    return buffer.getvalue()


def transform(image):
    import torch

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()


def grey(data):
    image = decode(data)
    pixels = np.asarray(image)
    assert (image.mode, (pixels == pixels[..., :1]).all()) == ("RGB", True)
    return pixels[..., 0]


def linear(x, center, width):
    """PS3.3 C.11.2.1.2.1, to [0, 255]."""
    if x <= center - 0.5 - (width - 1) / 2:
        return 0
    if x > center - 0.5 + (width - 1) / 2:
        return 255
    return round(((x - (center - 0.5)) / (width - 1) + 0.5) * 255)


def assert_grey(data, expected):
    np.testing.assert_array_equal(grey(data), np.asarray(expected))


# ---- grey values

BYTES = RNG.integers(10, 200, (5, 7), dtype=np.uint8)
WORDS = RNG.integers(0, 4096, (6, 9), dtype=np.uint16)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_eight_bits_are_shown_as_they_are(tmp_path, syntax):
    data = encoded(BYTES, syntax=syntax)
    assert_grey(data, BYTES)
    (tmp_path / "a.dcm").write_bytes(data)
    assert_grey(tmp_path / "a.dcm", BYTES)


def test_fewer_stored_bits_reach_white():
    values = np.array([[0, 5, 15]], np.uint8)
    assert_grey(encoded(values, BitsStored=4), [[0, 85, 255]])


def test_more_bits_without_a_window_go_from_the_smallest_to_the_largest_value():
    values = np.array([[1000, 1100], [1200, 1510]], np.uint16)
    assert_grey(encoded(values), [[0, 50], [100, 255]])
    assert_grey(encoded(values.astype(np.int16) - 1300), [[0, 50], [100, 255]])
    assert_grey(encoded(values, BitsStored=12, WindowCenter=""), [[0, 50], [100, 255]])


def test_a_flat_image_is_black_without_a_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_grey(encoded(np.full((3, 4), 700, np.uint16)), np.zeros((3, 4)))
    assert not caught


@pytest.mark.parametrize(("center", "width"), [(2048, 4096), (1500, 400), (100.5, 37), (4000, 2), (1200, 1), (-50, 9)])
def test_the_window_is_that_of_the_standard(center, width):
    expected = np.vectorize(lambda x: linear(x, center, width))(WORDS.astype(float))
    assert_grey(encoded(WORDS, WindowCenter=center, WindowWidth=width), expected)


def test_a_window_of_width_one_is_a_threshold():
    data = encoded(np.array([[699, 700, 701]], np.uint16), WindowCenter=700.5, WindowWidth=1)
    assert_grey(data, [[0, 0, 255]])


def test_a_window_counts_for_eight_bits_too():
    assert_grey(
        encoded(BYTES, WindowCenter=100, WindowWidth=50),
        np.vectorize(lambda x: linear(x, 100, 50))(BYTES.astype(float)),
    )


def test_the_first_of_several_windows_counts():
    several = encoded(WORDS, WindowCenter=[1000, 3000], WindowWidth=[500, 100])
    assert_grey(several, grey(encoded(WORDS, WindowCenter=1000, WindowWidth=500)))
    assert (grey(several) != grey(encoded(WORDS, WindowCenter=3000, WindowWidth=100))).any()


def test_values_are_rescaled_before_the_window():
    """As in CT: the window is in Hounsfield units, the stored values are not."""
    data = encoded(WORDS, RescaleSlope=0.5, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    assert_grey(data, np.vectorize(lambda x: linear(x * 0.5 - 1024, 40, 400))(WORDS.astype(float)))


def test_a_falling_rescale_turns_the_grey_around():
    values = np.array([[0, 51, 255]], np.uint8)
    assert_grey(encoded(values, RescaleSlope=-1, RescaleIntercept=0), [[255, 204, 0]])
    assert_grey(encoded(values.astype(np.uint16), RescaleSlope=-2, RescaleIntercept=9), [[255, 204, 0]])


def test_other_window_functions():
    exact = encoded(WORDS, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    assert_grey(exact, np.rint(np.clip((WORDS.astype(float) - 2000) / 1000 + 0.5, 0, 1) * 255))
    sigmoid = encoded(WORDS, WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID")
    expected = np.vectorize(lambda x: round(255 / (1 + math.exp(-4 * (x - 2000) / 1000))))(WORDS.astype(float))
    assert_grey(sigmoid, expected)


def test_monochrome1_is_inverted():
    assert_grey(encoded(BYTES, PhotometricInterpretation="MONOCHROME1"), 255 - BYTES)
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    inverted = grey(encoded(WORDS, PhotometricInterpretation="MONOCHROME1", **window)).astype(int)
    assert abs(inverted + grey(encoded(WORDS, **window)) - 255).max() <= 1
    assert inverted[np.unravel_index(WORDS.argmax(), WORDS.shape)] == inverted.min()


def test_signed_bytes_are_shown_over_their_range():
    assert_grey(encoded(np.array([[-128, 0, 127]], np.int8)), [[0, 128, 255]])


# ---- windows and rescaling in functional groups, padding, ranges


def sequence(**elements):
    item = pydicom.Dataset()
    for name, value in elements.items():
        setattr(item, name, value)
    return pydicom.Sequence([item])


def groups(center, width, slope=1, intercept=0, **more):
    return sequence(
        FrameVOILUTSequence=sequence(WindowCenter=center, WindowWidth=width, **more),
        PixelValueTransformationSequence=sequence(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU"),
    )


def expected_window(values, center, width):
    return np.vectorize(lambda x: linear(x, center, width))(np.asarray(values, float))


@pytest.mark.parametrize("place", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_enhanced_files_keep_window_and_rescaling_in_functional_groups(place):
    data = encoded(np.stack([WORDS, WORDS]), frames=2, **{place: groups(40, 400, 0.5, -1024)})
    assert_grey(data, expected_window(WORDS * 0.5 - 1024, 40, 400))


def test_the_frames_own_group_counts_before_the_shared_one_and_that_before_the_header():
    own, shared = groups(1000, 500), groups(3000, 100, 2, -7)
    header = {"WindowCenter": 5, "WindowWidth": 50, "RescaleSlope": 3, "RescaleIntercept": 1}
    data = encoded(WORDS[None], frames=1, PerFrameFunctionalGroupsSequence=own, **header)
    assert_grey(data, expected_window(WORDS, 1000, 500))
    data = encoded(WORDS[None], frames=1, SharedFunctionalGroupsSequence=shared, **header)
    assert_grey(data, expected_window(WORDS * 2.0 - 7, 3000, 100))
    both = {"SharedFunctionalGroupsSequence": shared, "PerFrameFunctionalGroupsSequence": own}
    assert_grey(encoded(WORDS[None], frames=1, **both), expected_window(WORDS, 1000, 500))


def test_the_window_function_of_a_functional_group_counts():
    data = encoded(
        WORDS[None], frames=1, SharedFunctionalGroupsSequence=groups(2000, 1000, VOILUTFunction="LINEAR_EXACT")
    )
    assert_grey(data, np.rint(np.clip((WORDS.astype(float) - 2000) / 1000 + 0.5, 0, 1) * 255))


def body(kind=np.int16, fill=-2000):
    """A round body of -800..1000 in a frame of padding."""
    values = RNG.integers(-800, 1001, (40, 40)).astype(kind)
    y, x = np.mgrid[:40, :40]
    outside = (y - 20) ** 2 + (x - 20) ** 2 > 300
    values[20, 20], values[20, 21] = -800, 1000
    values[outside] = fill
    return values, outside


@pytest.mark.parametrize("stored", ["signed", "as unsigned"])
def test_padding_counts_for_no_range_and_is_black(stored):
    values, outside = body()
    kind, value = ("SS", -2000) if stored == "signed" else ("US", 2**16 - 2000)
    data = encoded(values, PixelPaddingValue=pydicom.DataElement("PixelPaddingValue", kind, value))
    expected = np.where(outside, 0, np.rint((values + 800.0) / 1800 * 255))
    assert_grey(data, expected)
    inverted = encoded(values, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1")
    assert abs(grey(inverted).astype(int) - np.where(outside, 0, 255 - expected)).max() <= 1


def test_a_range_of_padding_and_padding_above_the_body():
    values, outside = body(fill=30000)
    values[0, :5] = 29990
    data = encoded(values, PixelPaddingValue=30000, PixelPaddingRangeLimit=29900)
    assert_grey(data, np.where(outside, 0, np.rint((values.clip(-800, 1000) + 800.0) / 1800 * 255)))
    assert not grey(encoded(np.full((4, 4), 9, np.int16), PixelPaddingValue=9)).any()


def test_one_metal_pixel_does_not_darken_the_rest():
    values = RNG.integers(0, 2001, (64, 64)).astype(np.int16)
    values[5, 5:7] = 0, 2000
    clean = grey(encoded(values)).copy()
    values[30, 30] = 30000
    metal = grey(encoded(values))
    assert len(np.unique(metal)) == 256
    assert metal[30, 30] == 255
    clean[30, 30] = 255
    np.testing.assert_array_equal(metal, clean)


def test_a_presentation_shape_inverts_once():
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    plain = grey(encoded(WORDS, **window, PresentationLUTShape="IDENTITY")).astype(int)
    inverse = grey(encoded(WORDS, **window, PresentationLUTShape="INVERSE")).astype(int)
    assert abs(inverse + plain - 255).max() <= 1
    radiograph = {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}
    np.testing.assert_array_equal(grey(encoded(WORDS, **window, **radiograph)), inverse)


def test_a_value_range_stands_for_the_window():
    data = encoded(WORDS, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    expected = np.rint(np.clip((WORDS - 1024.0 + 1000) / 2000, 0, 1) * 255)
    np.testing.assert_array_equal(np.asarray(decode(data, value_range=(-1000, 1000)))[..., 0], expected)
    np.testing.assert_array_equal(np.asarray(decode(encoded(BYTES), value_range=(0, 4095)))[..., 0], BYTES)


def test_float_pixels_are_shown_over_their_range():
    values = RNG.random((5, 6)).astype(np.float32) * 3 - 1
    values[0, 0] = -5000
    data = encoded(WORDS[:5, :6])
    dataset = pydicom.dcmread(io.BytesIO(data))
    del dataset.PixelData, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation
    dataset.BitsAllocated, dataset.FloatPixelData = 32, values.tobytes()
    dataset.FloatPixelPaddingValue = -5000.0
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    low, high = values[values > -5000].min(), values.max()
    expected = np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255)
    assert_grey(buffer.getvalue(), expected)


# ---- colour


def test_rgb_keeps_its_pixels_in_both_orders():
    pixels = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(decode(encoded(pixels))), pixels)
    planes = encoded(pixels, PlanarConfiguration=1, PixelData=pixels.transpose(2, 0, 1).tobytes())
    np.testing.assert_array_equal(np.asarray(decode(planes)), pixels)


def test_rgb_of_sixteen_bits_loses_the_low_bits():
    pixels = RNG.integers(0, 2**12, (4, 6, 3), dtype=np.uint16)
    np.testing.assert_array_equal(np.asarray(decode(encoded(pixels, BitsStored=12))), pixels >> 4)


def test_ybr_becomes_rgb():
    pixels = np.asarray(Image.new("RGB", (4, 2), (200, 60, 90)))
    ybr = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    image = np.asarray(decode(encoded(ybr, PhotometricInterpretation="YBR_FULL")))
    assert abs(image.astype(int) - pixels).max() <= 2


def test_a_palette_is_applied():
    tables = {}
    for name, values in {"Red": [0, 0xFFFF, 0x1234], "Green": [0x8000, 0, 0], "Blue": [0, 0, 0xFF00]}.items():
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = np.array(values, "<u2").tobytes()
    data = encoded(np.array([[0, 1, 2, 1]], np.uint8), PhotometricInterpretation="PALETTE COLOR", **tables)
    assert np.asarray(decode(data)).tolist() == [[[0, 128, 0], [255, 0, 0], [0x12, 0, 255], [255, 0, 0]]]


# ---- frames and files


def test_the_first_frame_counts():
    frames = RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    assert_grey(encoded(frames, frames=3), frames[0])
    assert_grey(encoded(np.stack([WORDS, WORDS + 900]), frames=2), grey(encoded(WORDS)))


def test_deflated_files_are_read():
    assert_grey(encoded(BYTES, syntax=uid.DeflatedExplicitVRLittleEndian), BYTES)


def test_run_lengths_are_read():
    values = np.repeat(WORDS[:1], 40, axis=0)  # the compressed file is the smaller one
    values[20:] = 7
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    data = pydicom.dcmread(io.BytesIO(encoded(values.repeat(30, axis=1), **window)))
    data.compress(uid.RLELossless)
    buffer = io.BytesIO()
    data.save_as(buffer)
    assert len(buffer.getvalue()) < values.nbytes * 30
    assert_grey(buffer.getvalue(), grey(encoded(values.repeat(30, axis=1), **window)))


def test_a_file_is_known_by_its_content_and_other_images_stay_what_they_are(tmp_path):
    (tmp_path / "IM0001").write_bytes(encoded(BYTES))
    assert_grey(tmp_path / "IM0001", BYTES)
    Image.fromarray(BYTES).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.dcm")
    assert_grey(tmp_path / "a.dcm", BYTES)


def test_the_folder_scan_finds_dicom(tmp_path):
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "a.DCM").write_bytes(encoded(BYTES))
    Image.fromarray(BYTES).save(tmp_path / "ct" / "b.png")
    source = ImageFolder(tmp_path)
    assert (source.ids, source.label_names) == (["ct/a.DCM", "ct/b.png"], ["ct"])
    np.testing.assert_array_equal(np.asarray(source.open(0)), np.asarray(source.open(1)))


def test_dicom_in_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [encoded(BYTES)]}), tmp_path / "pack.parquet")
    np.testing.assert_array_equal(np.asarray(ParquetImages(tmp_path / "pack.parquet").open(0))[..., 0], BYTES)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("meta", [True, False])
def test_files_without_preamble_are_read(tmp_path, syntax, meta):
    dataset = pydicom.dcmread(io.BytesIO(encoded(WORDS, syntax=syntax, WindowCenter=2000, WindowWidth=900)))
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.CTImageStorage, "1.2.3"
    if meta:
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset)
        data = buffer.getvalue()[132:]
    else:
        buffer = pydicom.filebase.DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = True, syntax.is_implicit_VR
        pydicom.filewriter.write_dataset(buffer, dataset)
        data = buffer.getvalue()
    assert_grey(data, expected_window(WORDS, 2000, 900))
    with pytest.raises(ImageError, match=r"'cut'"):
        decode(data[:-7], name="cut")
    (tmp_path / "IM00001").write_bytes(data)
    assert ImageFolder(tmp_path).ids == ["IM00001"]


def test_the_folder_scan_finds_dicom_by_content(tmp_path):
    for name in ("IM00001", "1.2.840.113.17", "a.dicom", "b.IMA", "c.dcm"):
        (tmp_path / name).write_bytes(encoded(BYTES))
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(100))
    (tmp_path / "README").write_text("no image")
    (tmp_path / "Thumbs.db").write_bytes(bytes(200))
    source = ImageFolder(tmp_path)
    assert source.ids == ["1.2.840.113.17", "IM00001", "a.dicom", "b.IMA", "c.dcm"]
    assert not source.skipped
    assert all((np.asarray(image)[..., 0] == BYTES).all() for _, image in source)
    assert len(open_source(tmp_path / "IM00001")) == 1


# ---- failures


@pytest.mark.parametrize("kind", [{}, {"frames": 6}, {"syntax": uid.ImplicitVRLittleEndian}])
def test_truncated_files_fail_wherever_they_are_cut(kind):
    data = encoded(WORDS, **kind) if "frames" not in kind else encoded(WORDS.reshape(6, 3, 3), **kind)
    assert decode(data).mode == "RGB"
    for end in [*range(133, len(data), 23), len(data) - 1, len(data) - 5, len(data) - 12]:
        with pytest.raises(ImageError, match=r"^Image 'cut\.dcm' cannot be read: "):
            decode(data[:end], name="cut.dcm")
    with pytest.raises(ImageError, match="the file is truncated"):
        decode(data[:-1])


@pytest.mark.parametrize(
    ("flaw", "reason"),
    [
        ({"drop": ["Rows"]}, "without an image, or cut off before it: Rows is missing"),
        ({"drop": ["PixelData"]}, "truncated"),
        ({"drop": ["PhotometricInterpretation"]}, "header lacks PhotometricInterpretation, .* add it"),
        ({"drop": ["BitsAllocated"]}, "header lacks BitsAllocated, .* add it"),
        ({"drop": ["PixelRepresentation"]}, "header lacks PixelRepresentation, .* add it"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "its window width is 0"),
        ({"WindowCenter": 5, "WindowWidth": 0.5}, r"its window width is 0\.5"),
        ({"Rows": 0}, "7 x 0 pixels"),
    ],
)
def test_a_flawed_file_says_what_is_wrong(flaw, reason):
    with pytest.raises(ImageError, match=rf"'x\.dcm' cannot be read: .*{reason}"):
        decode(encoded(BYTES, **flaw), name="x.dcm")


@pytest.mark.parametrize("absent", [["SamplesPerPixel"], ["BitsStored"], ["SamplesPerPixel", "BitsStored"]])
def test_what_the_standard_lets_one_conclude_may_be_absent(absent):
    window = {"WindowCenter": 2000, "WindowWidth": 900}
    assert_grey(encoded(WORDS, drop=absent, **window), grey(encoded(WORDS, **window)))
    frames = np.stack([BYTES, 255 - BYTES])
    assert_grey(encoded(frames, frames=2, drop=absent), BYTES)
    with pytest.raises(ImageError, match="truncated"):
        decode(encoded(WORDS, drop=absent)[:-3])


def test_a_constant_file_is_noted(tmp_path):
    (tmp_path / "a.dcm").write_bytes(encoded(np.full((6, 9), 700, np.uint16)))
    (tmp_path / "b.dcm").write_bytes(encoded(WORDS))
    (batch,) = load_batches(ImageFolder(tmp_path), transform)
    assert batch.notes == [(0, "constant")]


def test_a_half_width_is_fine_where_the_function_allows_it():
    data = encoded(BYTES, WindowCenter=100, WindowWidth=0.5, VOILUTFunction="LINEAR_EXACT")
    assert_grey(data, np.where(BYTES == 100, 128, np.where(BYTES > 100, 255, 0)))


def test_other_files_named_dcm_are_no_images(tmp_path):
    (tmp_path / "a.dcm").write_bytes(bytes(range(256)) * 2)
    with pytest.raises(ImageError, match=r"a\.dcm' cannot be read: it is no image"):
        decode(tmp_path / "a.dcm")


def test_max_pixels_is_read_from_the_header(monkeypatch):
    assert decode(encoded(BYTES), max_pixels=35).size == (7, 5)
    with pytest.raises(ImageError, match="it has 7 x 5 pixels and max_pixels is 34"):
        decode(encoded(BYTES), max_pixels=34)
    monkeypatch.setattr("pydicom.pixels.pixel_array", None)
    with pytest.raises(ImageError, match="it has 60000 x 60000 pixels and max_pixels is 100000000"):
        decode(encoded(BYTES, Rows=60000, Columns=60000))


def test_failures_are_recorded_like_others(tmp_path):
    (tmp_path / "a.dcm").write_bytes(encoded(BYTES))
    (tmp_path / "b.dcm").write_bytes(encoded(BYTES)[:-9])

    (batch,) = load_batches(ImageFolder(tmp_path), transform, on_error="record")
    assert batch.indices.tolist() == [0]
    assert [index for index, _ in batch.failures] == [1]
    assert "b.dcm' cannot be read: the file is truncated." in batch.failures[0][1]


# ---- without pydicom


@pytest.fixture
def without_pydicom(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setattr("ood_core.data.dicom.find_spec", lambda name: None)


def test_without_pydicom_the_message_has_the_command(tmp_path, without_pydicom):
    with pytest.raises(ImageError, match=r"needs pydicom: pip install 'ood-core\[dicom\]'\.$"):
        decode(encoded(BYTES))
    assert ".dcm" not in image_suffixes()
    (tmp_path / "a.dcm").write_bytes(encoded(BYTES))
    with pytest.raises(DataError, match=r"holds no image.*DICOM files as '.*a\.dcm': pip install 'ood-core\[dicom\]'"):
        ImageFolder(tmp_path)
    Image.fromarray(BYTES).save(tmp_path / "b.png")
    (tmp_path / "IM0002").write_bytes(encoded(BYTES))
    source = ImageFolder(tmp_path)
    assert (source.ids, source.skipped) == (["b.png"], ["IM0002", "a.dcm"])


def test_with_pydicom_an_empty_folder_has_no_hint(tmp_path):
    assert ".dcm" in image_suffixes()
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"holds no image") as error:
        ImageFolder(tmp_path)
    assert "pip" not in str(error.value)
