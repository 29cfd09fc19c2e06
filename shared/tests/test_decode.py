"""Decoding: every kind of image becomes the right RGB pixels, every broken one an error that names it."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from ood_core.data import decode, to_rgb
from ood_core.data.depth import NOTE
from ood_core.errors import ImageError, UsageError
from PIL import Image, ImageFile, PngImagePlugin


@pytest.fixture
def photo():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def assert_pixels(image, expected):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


# ---- modes


def test_a_lossless_file_keeps_its_pixels(photo, tmp_path):
    photo.save(tmp_path / "a.png")
    assert_pixels(decode(tmp_path / "a.png"), np.asarray(photo))
    assert_pixels(decode(str(tmp_path / "a.png")), np.asarray(photo))
    assert_pixels(decode((tmp_path / "a.png").read_bytes()), np.asarray(photo))
    assert_pixels(decode(memoryview((tmp_path / "a.png").read_bytes())), np.asarray(photo))


@pytest.mark.parametrize("size", [(1, 1), (10000, 3), (3, 10000)])
def test_small_and_thin_images_are_decoded(size):
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert_pixels(decode(encoded(Image.fromarray(pixels), "PNG")), pixels)


def test_grey_and_one_bit_are_repeated_over_the_channels(photo):
    grey, bits = photo.convert("L"), photo.convert("1")
    assert_pixels(decode(encoded(grey, "PNG")), np.repeat(np.asarray(grey)[..., None], 3, 2))
    assert_pixels(decode(encoded(bits, "PNG")), np.repeat(np.asarray(bits)[..., None] * np.uint8(255), 3, 2))


def over_white(color, alpha):
    return color * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "La", "RGBa"])
def test_alpha_is_shown_over_white(photo, mode):
    rgba = photo.convert("RGBA")
    alpha = Image.fromarray(np.random.default_rng(2).integers(0, 256, (37, 53), dtype=np.uint8))
    image = photo.convert({"LA": "L", "La": "L", "PA": "P"}.get(mode, "RGB"))
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode))
    image.putalpha(alpha)
    rgba = (image.convert("LA") if mode == "La" else image).convert("RGBA")
    image = image.convert(mode)
    color, weight = np.asarray(rgba)[..., :3].astype(float), np.asarray(alpha)[..., None]
    result = np.asarray(to_rgb(image)).astype(float)
    visible = np.broadcast_to(weight > 128, result.shape)  # premultiplied modes lose the colour of faint pixels
    if mode in ("LA", "RGBA", "PA"):
        visible = np.ones_like(visible)
    assert abs(result - over_white(color, weight))[visible].max() <= 2


def test_a_fully_opaque_image_equals_its_rgb(photo):
    assert_pixels(decode(encoded(photo.convert("RGBA"), "PNG")), np.asarray(photo))


def test_a_fully_transparent_image_is_white(photo):
    photo.putalpha(0)
    assert_pixels(decode(encoded(photo, "PNG")), np.full((37, 53, 3), 255))


def test_a_palette_with_one_transparent_colour_and_one_with_alpha():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    one = decode(encoded(image, "PNG", transparency=1))
    assert_pixels(one, [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]])
    each = decode(encoded(image, "PNG", transparency=bytes([255, 0, 0])))
    assert_pixels(each, [[[10, 20, 30], [255, 255, 255], [255, 255, 255]]])
    assert_pixels(decode(encoded(image, "PNG")), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])


def test_a_transparent_colour_of_grey_and_rgb_files():
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert_pixels(decode(encoded(grey, "PNG", transparency=9)), [[[7, 7, 7], [255, 255, 255]]])
    color = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert_pixels(decode(encoded(color, "PNG", transparency=(1, 2, 3))), [[[255, 255, 255], [4, 5, 6]]])


def test_cmyk_file_has_its_colours():
    image = Image.new("RGB", (16, 16), (200, 30, 90)).convert("CMYK")
    assert abs(np.asarray(decode(encoded(image, "JPEG"))).astype(int) - (200, 30, 90)).max() <= 4
    assert_pixels(decode(encoded(image, "TIFF")), np.full((16, 16, 3), (200, 30, 90)))


@pytest.mark.parametrize(("mode", "tolerance"), [("YCbCr", 3), ("HSV", 8), ("LAB", 12)])
def test_other_colour_spaces_come_back(mode, tolerance):
    image = Image.new("RGB", (4, 4), (180, 120, 60))
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = image.convert(mode)
    assert abs(np.asarray(to_rgb(image)).astype(int) - (180, 120, 60)).max() <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_files_lose_their_low_byte(kind):
    values = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    result = decode(encoded(Image.fromarray(values), kind))
    assert_pixels(result, np.repeat([[[0], [0], [1], [0x12], [255]]], 3, 2))


def test_big_endian_sixteen_bit():
    image = Image.frombytes("I;16B", (2, 1), b"\x12\x34\xff\x00")
    assert_pixels(to_rgb(image), np.repeat([[[0x12], [0xFF]]], 3, 2))


# ---- more than 8 bits: one rule for every format


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png16(values, *chunks):
    """A 16-bit PNG of [H, W] grey, or of [H, W, 2 to 4] channels."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if values.ndim == 2 else values.shape[2]]
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


KINDS = {"u": 1, "i": 2, "f": 3, "c": 6}


def tiff(values, *, order="<", tags=None):
    """An uncompressed TIFF of [H, W] or [H, W, C], or with `planar` in the tags of [C, H, W]."""
    tags = dict(tags or {})
    planes = tags.pop("planar", False)
    shape = values.shape[1:] + values.shape[:1] if planes else values.shape
    channels = shape[2] if len(shape) == 3 else 1
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    size = len(data) // (channels if planes else 1)
    strips = [size] * (channels if planes else 1)
    entries = {
        256: ("L", [shape[1]]),
        257: ("L", [shape[0]]),
        258: ("H", [8 * values.itemsize] * channels),
        259: ("H", [1]),
        262: ("H", [1]),
        273: ("L", [8 + sum(strips[:i]) for i in range(len(strips))]),
        277: ("H", [channels]),
        278: ("L", [shape[0]]),
        279: ("L", strips),
        284: ("H", [2 if planes else 1]),
        339: ("H", [KINDS[values.dtype.kind]] * channels),
    } | tags
    codes = {"B": 1, "s": 2, "H": 3, "L": 4, "h": 8, "f": 11, "d": 12}
    extra_at = 8 + len(data) + 2 + 12 * len(entries) + 4
    directory, extra = struct.pack(order + "H", len(entries)), b""
    for tag, (code, numbers) in sorted(entries.items()):
        raw = numbers if code == "s" else struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        place = raw.ljust(4, b"\0")
        if len(raw) > 4:
            place = struct.pack(order + "L", extra_at + len(extra))
            extra += raw + b"\0" * (len(raw) % 2)
        directory += struct.pack(order + "HHL", tag, codes[code], len(numbers)) + place
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "HL", 42, 8 + len(data))
    return mark + data + directory + bytes(4) + extra


def grey(image):
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def scaled(values, low, high):
    """The independent form of the rule."""
    share = (np.asarray(values, np.longdouble) - low) / (np.longdouble(high) - low)
    return np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)


RNG = np.random.default_rng(7)
TWELVE = RNG.integers(0, 4096, (12, 17)).astype(np.uint16)
TWELVE[0, :2] = 0, 4095
SBIT = chunk(b"sBIT", bytes([12]))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "tags",
    [
        {341: ("H", [4095])},
        {340: ("H", [0]), 341: ("H", [4095])},
        {281: ("H", [4095])},
        {270: ("s", b'<OME><Pixels SignificantBits="12" Type="uint16"/></OME>\0')},
    ],
)
def test_the_depth_that_a_tiff_states_is_used(tags, order):
    image = decode(tiff(TWELVE, tags=tags, order=order))
    np.testing.assert_array_equal(grey(image), scaled(TWELVE, 0, 4095))
    assert NOTE not in image.info


def test_a_statement_that_the_values_contradict_is_none():
    values = TWELVE.copy()
    values[3, 3] = 60000
    for data in (tiff(values, tags={341: ("H", [4095])}), png16(values, SBIT)):
        np.testing.assert_array_equal(grey(decode(data)), values >> 8)
    np.testing.assert_array_equal(grey(decode(tiff(values, tags={281: ("H", [3801])}))), values >> 8)  # a statistic


def test_packed_12_bit_tiff():
    values = RNG.integers(0, 4096, (4, 6)).astype(np.uint16)
    pairs = values.reshape(-1, 2).astype(int)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    data = tiff(packed.astype(np.uint8).reshape(4, 9), tags={256: ("L", [6]), 258: ("H", [12])})
    np.testing.assert_array_equal(grey(decode(data)), scaled(values, 0, 4095))


@pytest.mark.parametrize("spread", ["none", "zeros", "repeated"])
def test_significant_bits_of_a_png_wherever_they_stand(spread):
    """The standard wants 12 bits at the top of 16; many writers leave them at the bottom."""
    values = {"none": TWELVE, "zeros": TWELVE << 4, "repeated": TWELVE << 4 | TWELVE >> 8}[spread]
    image = decode(png16(values, SBIT))
    assert abs(grey(image).astype(int) - scaled(TWELVE, 0, 4095)).max() <= (0 if spread == "none" else 1)
    dark = TWELVE[TWELVE < 200][None]
    if spread == "zeros":  # below 4096, but plainly spread over 16 bits
        np.testing.assert_array_equal(grey(decode(png16(dark << 4, SBIT))), dark[..., :] >> 4)
    assert NOTE not in image.info


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_keeps_its_low_bytes(channels):
    values = RNG.integers(0, 4096, (5, 8, channels)).astype(np.uint16)
    alpha = channels in (2, 4)
    if alpha:
        values[..., -1] = 65535
    colour = values[..., : channels - alpha]
    expected = np.broadcast_to(scaled(colour, 0, 4095), (5, 8, 3))
    data = png16(values)
    assert_pixels(decode(data, value_range=(0, 4095)), expected)
    assert_pixels(decode(png16(values, chunk(b"sBIT", bytes([12] * channels)))), expected)
    plain = decode(data)
    assert_pixels(plain, np.broadcast_to(colour >> 8, (5, 8, 3)))
    assert plain.info[NOTE] == f"narrow:{colour.max()}"
    assert_pixels(to_rgb(Image.open(io.BytesIO(data)), value_range=(0, 4095)), expected)


@pytest.mark.parametrize("order", "<>")
def test_16_bit_colour_tiff_keeps_its_low_bytes(order):
    values = RNG.integers(0, 4096, (5, 8, 3)).astype(np.uint16)
    data = tiff(values, order=order, tags={262: ("H", [2])})
    assert_pixels(decode(data, value_range=(0, 4095)), scaled(values, 0, 4095))
    assert decode(data).info[NOTE] == f"narrow:{values.max()}"
    buffer = io.BytesIO()
    stated = tiff(values, order=order, tags={262: ("H", [2]), 341: ("H", [4095] * 3)})
    assert_pixels(decode(stated), scaled(values, 0, 4095))
    Image.open(io.BytesIO(data)).save(buffer, "TIFF")  # 8 bits by now
    assert NOTE not in decode(buffer.getvalue()).info


def test_transparency_of_16_bit_files_is_exact():
    values = np.array([[0x1234, 0x1235, 0xFFFF]], np.uint16)
    data = png16(values, chunk(b"tRNS", struct.pack(">H", 0x1234)))
    assert grey(decode(data)).tolist() == [[255, 0x12, 255]]
    colour = np.stack([values] * 3, -1)
    data = png16(colour, chunk(b"tRNS", struct.pack(">HHH", *[0x1234] * 3)))
    assert grey(decode(data)).tolist() == [[255, 0x12, 255]]


@pytest.mark.parametrize("encode", [png16, tiff])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_few_bits_in_16_are_noted_and_not_guessed(encode, bits):
    values = (RNG.integers(0, 2**bits, (9, 9))).astype(np.uint16)
    values[0, 0] = 2**bits - 1
    image = decode(encode(values))
    np.testing.assert_array_equal(grey(image), values >> 8)
    assert image.info[NOTE] == f"narrow:{2**bits - 1}"
    told = decode(encode(values), value_range=(0, 2**bits - 1))
    np.testing.assert_array_equal(grey(told), scaled(values, 0, 2**bits - 1))
    assert NOTE not in told.info


def test_full_and_constant_16_bit_images_are_not_noted():
    for values in (np.array([[0, 65535]], np.uint16), np.full((3, 3), 700, np.uint16)):
        assert NOTE not in decode(png16(values)).info


def test_8_bit_images_do_not_heed_a_value_range(photo):
    assert_pixels(decode(encoded(photo, "PNG"), value_range=(0, 4095)), np.asarray(photo))
    assert NOTE not in decode(encoded(Image.new("RGB", (3, 3)), "PNG")).info


@pytest.mark.parametrize(
    "scale", [(1, 0), (1.0001, 0), (2, -1), (65535, 0), (4000, -1000), (1e300, 0), (1e-300, 5e-300)]
)
def test_floats_are_shown_over_the_range_of_the_image(scale):
    """Also where the largest value is just above 1: no threshold, no jump."""
    unit = RNG.random((20, 30))
    values = unit * scale[0] + scale[1]
    kind = np.float64 if scale[0] > 1e30 or scale[0] < 1e-30 else np.float32
    if kind is np.float64:
        pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    values = values.astype(kind)
    image = grey(decode(tiff(values)))
    assert abs(image.astype(int) - scaled(values, values.min(), values.max())).max() <= 1
    assert len(np.unique(image)) > 200


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("i2", -1000, 1000), ("u4", 0, 2**20), ("i4", -(2**20), 50), ("f4", -1, 1), ("u4", 0, 2**32 - 1)],
)
def test_wide_and_signed_tiffs_follow_the_same_rule(kind, low, high, order):
    values = np.linspace(low, high, 600).reshape(20, 30).astype(kind)
    data = tiff(values, order=order)
    try:
        Image.open(io.BytesIO(data))
    except OSError:
        pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    assert abs(grey(decode(data)).astype(int) - scaled(values, low, high)).max() <= 1
    half = (low, low + (high - low) / 2)
    assert abs(grey(decode(data, value_range=half)).astype(int) - scaled(values, *half)).max() <= 1


def test_stated_extremes_hold_for_signed_values_and_floats():
    values = np.array([[-500, 0, 500]], np.int16)
    tags = {340: ("h", [-1000]), 341: ("h", [1000])}
    np.testing.assert_array_equal(grey(decode(tiff(values, tags=tags))), scaled(values, -1000, 1000))
    tags = {340: ("f", [-2.0]), 341: ("f", [2.0])}
    floats = np.array([[-1, 0, 1]], np.float32)
    np.testing.assert_array_equal(grey(decode(tiff(floats, tags=tags))), scaled(floats, -2, 2))


def test_8_bit_signed_values_are_signed():
    values = np.array([[-128, -1, 0, 127]], np.int8)
    np.testing.assert_array_equal(grey(decode(tiff(values))), scaled(values, -128, 127))


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_min_is_white(kind):
    values = np.array([[0, 0x8000, 0xFFFF]], kind)
    assert grey(decode(tiff(values, tags={262: ("H", [0])}))).tolist() == [[255, 127, 0]]


def test_integer_images_have_no_threshold():
    """[100, 255] and [100, 256] are all but the same picture."""
    for largest in (255, 256, 300, 70000):
        image = Image.fromarray(np.array([[100, largest]], np.int32))
        assert grey(to_rgb(image)).tolist() == [[0, 255]]
        assert grey(to_rgb(image, value_range=(0, 255))).tolist() == [[100, 255]]


def test_a_large_maxval_of_pgm_is_white():
    values = np.array([[0, 512, 1023]])
    data = b"P5 3 1 1023\n" + values.astype(">u2").tobytes()
    assert abs(grey(decode(data)).astype(int) - scaled(values, 0, 1023)).max() <= 1
    assert NOTE not in decode(data).info


def test_float_images():
    unit = np.array([[0, 0.5, 1, np.nan]], np.float32)
    wide = np.array([[-9, 0.5, 77, 300, np.inf, -np.inf]], np.float32)
    assert grey(to_rgb(Image.fromarray(unit))).tolist() == [[0, 128, 255, 0]]
    assert grey(to_rgb(Image.fromarray(wide))).tolist() == [[*scaled(wide[0, :4], -9, 300), 255, 0]]
    assert grey(to_rgb(Image.fromarray(wide), value_range=(0, 255))).tolist() == [[0, 0, 77, 255, 255, 0]]
    assert not grey(to_rgb(Image.fromarray(np.full((2, 2), np.nan, np.float32)))).any()


def test_outliers_do_not_darken_the_rest():
    values = RNG.normal(100, 10, (64, 64)).astype(np.float32)
    expected = grey(decode(tiff(values))).astype(int)
    values[0, 0], values[5, 5], values[9, 9] = 1e9, -1e9, np.inf
    found = grey(decode(tiff(values))).astype(int)
    assert abs(found - expected)[1:].flatten()[np.arange(63 * 64) % 64 > 9].max() <= 1
    assert (found[0, 0], found[5, 5], found[9, 9]) == (255, 0, 255)


def test_a_few_bright_pixels_on_black_stay():
    values = np.zeros((40, 40), np.float32)
    values[3, 3] = 7
    assert grey(decode(tiff(values)))[3, 3] == 255


@pytest.mark.parametrize("bad", [(5, 5), (9, 1), (0,), (0, 1, 2), (0, np.inf), (np.nan, 1), "01a", 7])
def test_a_wrong_value_range_is_a_wrong_argument(photo, bad):
    with pytest.raises(UsageError, match=r"value_range=.*black before white"):
        decode(encoded(photo, "PNG"), value_range=bad)


# ---- TIFF beyond Pillow


def test_float64_and_unusual_channels_are_read():
    pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    floats = RNG.random((6, 7)) * 9 - 3
    np.testing.assert_array_equal(grey(decode(tiff(floats))), scaled(floats, floats.min(), floats.max()))
    five = RNG.integers(0, 256, (6, 7, 5)).astype(np.uint8)
    image = decode(tiff(five, tags={262: ("H", [2]), 338: ("H", [0, 0])}))
    assert_pixels(image, five[..., :3])
    words = RNG.integers(0, 65536, (6, 7, 2)).astype(np.uint16)
    image = decode(tiff(words, tags={338: ("H", [0])}))
    np.testing.assert_array_equal(grey(image), words[..., 0] >> 8)
    assert image.info[NOTE] == "channels:2"
    words[..., 1] = 65535
    words[0, 0, 1] = 0
    opaque = decode(tiff(words, tags={338: ("H", [2])}))
    assert NOTE not in opaque.info
    assert grey(opaque)[0].tolist() == [255, *(words[0, 1:, 0] >> 8)]
    many = RNG.integers(0, 65536, (6, 7, 5)).astype(np.uint16)
    image = decode(tiff(many, tags={338: ("H", [0] * 4)}))
    np.testing.assert_array_equal(grey(image), many[..., 0] >> 8)
    assert image.info[NOTE] == "channels:5"


@pytest.mark.parametrize("order", "<>")
def test_planes_of_16_bits_are_not_taken_for_bytes(order):
    pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    values = RNG.integers(0, 65536, (3, 6, 7)).astype(np.uint16)
    data = tiff(values, order=order, tags={262: ("H", [2]), "planar": True})
    assert_pixels(decode(data), values.transpose(1, 2, 0) >> 8)


def test_orientation_and_size_count_in_other_tiffs_too():
    pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    floats = RNG.random((6, 7))
    turned = grey(decode(tiff(floats, tags={274: ("H", [6])})))
    np.testing.assert_array_equal(turned, np.rot90(scaled(floats, floats.min(), floats.max()), -1))
    with pytest.raises(ImageError, match="7 x 6 pixels and max_pixels is 41"):
        decode(tiff(floats), max_pixels=41)
    for end in (-30, 100):
        with pytest.raises(ImageError, match=r"'cut\.tif'"):
            decode(tiff(floats)[:end], name="cut.tif")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"bigtiff": True}])
def test_tiffs_of_another_writer_whole_and_cut(options):
    tifffile = pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    buffer, floats = io.BytesIO(), RNG.random((40, 50))
    tifffile.imwrite(buffer, floats, **options)
    data = buffer.getvalue()
    np.testing.assert_array_equal(grey(decode(data)), scaled(floats, floats.min(), floats.max()))
    for share in (0.01, 0.5, 0.95):
        with pytest.raises(ImageError, match=r"'cut\.tif'"):
            decode(data[: int(len(data) * share)], name="cut.tif")


def test_other_tiffs_name_their_kind(monkeypatch):
    pytest.importorskip("tifffile", reason="the extra 'tiff' is not installed")
    waves = np.ones((4, 4), np.complex64)
    with pytest.raises(ImageError, match=r"'w\.tif'.*TIFF file of 1 channel of 64-bit complex floats.*convert"):
        decode(tiff(waves), name="w.tif")
    monkeypatch.setattr("ood_core.data.tiff.find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"'a\.tif'.*1 channel of 64-bit floats, which needs tifffile: pip install"):
        decode(tiff(np.zeros((4, 4))), name="a.tif")
    with pytest.raises(ImageError, match="5 channels of 16-bit unsigned integers"):
        decode(tiff(np.zeros((4, 4, 5), np.uint16), tags={338: ("H", [0] * 4)}))


# ---- PNG with long texts


def with_chunks(data, *chunks, at=33):
    return data[:at] + b"".join(chunks) + data[at:]


LONG = {
    "compressed text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (3 << 20))),
    "international text": chunk(b"iTXt", b"Notes\0\1\0\0\0" + zlib.compress(b"x" * (3 << 20))),
    "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>" * (1 << 20))),
    "profile": chunk(b"iCCP", b"wide\0\0" + zlib.compress(bytes(3 << 20))),
    "bomb": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(90 << 20))),
    "plain text": chunk(b"tEXt", b"Comment\0" + b"x" * (70 << 20)),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("place", ["before", "after"])
def test_long_texts_and_profiles_do_not_matter(photo, kind, place):
    data = encoded(photo, "PNG")
    before = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    longer = with_chunks(data, LONG[kind], at=33 if place == "before" else len(data) - 12)
    assert_pixels(decode(longer), np.asarray(photo))
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


def test_an_orientation_in_a_long_text_counts(photo):
    data = encoded(photo, "PNG")
    text = b" " * (3 << 20) + b'<rdf:Description tiff:Orientation="6"/>' + b" " * (1 << 20)
    xmp = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(text))
    assert_pixels(decode(with_chunks(data, xmp)), UPRIGHT[6](np.asarray(photo)))


def test_memory_stays_bounded_with_long_texts(photo):
    import tracemalloc

    data = with_chunks(encoded(photo, "PNG"), LONG["bomb"])
    tracemalloc.start()
    try:
        decode(data)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_cut_file_with_long_texts_is_still_cut(photo):
    data = with_chunks(encoded(photo, "PNG"), LONG["profile"])
    for end in (len(data) - 30, len(data) // 2, 60):
        with pytest.raises(ImageError, match=r"'cut\.png'"):
            decode(data[:end], name="cut.png")


# ---- orientation and animation


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_once(photo, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(encoded(photo, kind, exif=exif))
    assert_pixels(upright, UPRIGHT[orientation](np.asarray(photo)))
    assert_pixels(to_rgb(upright), np.asarray(upright))


def test_a_broken_exif_block_does_not_matter(photo):
    data = encoded(photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert_pixels(decode(data), np.asarray(decode(encoded(photo, "JPEG"))))


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_the_first_frame_of_an_animation_counts(kind, options):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(red, kind, save_all=True, append_images=[blue], **options)
    assert_pixels(decode(data), np.asarray(red))
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert_pixels(to_rgb(opened), np.asarray(red))


# ---- failures


FILES = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("WEBP", {}),
    ("PPM", {}),
]


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(("kind", "options"), FILES)
@pytest.mark.filterwarnings("default")  # Pillow warns of the cut directory of a TIFF
def test_truncated_files_fail_whatever_pillow_is_told(photo, monkeypatch, kind, options, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    data = encoded(photo.resize((300, 200)), kind, **options)
    assert decode(data).size == (300, 200)
    for share in (0.2, 0.6, 0.98):
        with pytest.raises(ImageError, match=r"'cut\.img'"):
            decode(data[: int(len(data) * share)], name="cut.img")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\n <!DOCTYPE html><html>Not found</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "text"),
        (b"PK\x03\x04" + bytes(range(200)), "no image"),
        (b"\x89PNG\r\n\x1a\n", "no image|truncated"),
    ],
)
def test_files_that_are_no_images_say_what_they_are(tmp_path, data, reason):
    path = tmp_path / "cat.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"cat\.jpg'.*({reason})"):
        decode(path)


@pytest.mark.parametrize("limit", ["pillow's", "ours"])
def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch, limit):
    if limit == "ours":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match=r"bomb\.png.*1600000000|bomb\.png.*40000 x 40000 pixels"):
        decode(png_header(40000, 40000), name="bomb.png")


def test_max_pixels_is_the_largest_size_that_is_decoded(photo):
    data = encoded(photo, "PNG")
    assert decode(data, max_pixels=37 * 53).size == (53, 37)
    with pytest.raises(ImageError, match="53 x 37 pixels and max_pixels is 1960"):
        decode(data, max_pixels=37 * 53 - 1)


def test_a_limit_of_the_callers_own_goes_beyond_pillows(monkeypatch, photo):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(photo, "PNG")
    with pytest.raises(ImageError, match="big"):
        decode(data, name="big")
    assert_pixels(decode(data, max_pixels=37 * 53), np.asarray(photo))
    with pytest.raises(ImageError, match="53 x 37 pixels and max_pixels is 300"):
        decode(data, max_pixels=300)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_warning_filters_neither_matter_nor_change(monkeypatch, photo, action):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 37 * 53 - 1)  # one pixel more is a warning, twice it an error
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        before = list(warnings.filters)
        assert_pixels(decode(encoded(photo, "PNG")), np.asarray(photo))
        with pytest.raises(ImageError, match="big"):
            decode(encoded(photo.resize((100, 100)), "PNG"), name="big")
        assert list(warnings.filters) == before
    assert Image.MAX_IMAGE_PIXELS == 37 * 53 - 1


def test_missing_files_links_folders_and_pipes_are_named(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {
        "no.jpg": "no such",
        "link.jpg": "link",
        "folder.jpg": "folder",
        "pipe.jpg": "regular",
    }.items():
        with pytest.raises(ImageError, match=rf"{name}'.*{reason}"):
            decode(tmp_path / name)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "secret.jpg").write_bytes(b"x")
    monkeypatch.setattr(io, "FileIO", refuse)  # the superuser may read anything
    with pytest.raises(ImageError, match=r"secret\.jpg'.*Permission denied"):
        decode(tmp_path / "secret.jpg")


def test_an_odd_name_can_be_printed(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")
    with pytest.raises(ImageError, match="udcff") as caught:
        decode(path)
    str(caught.value).encode("utf-8")


def test_a_broken_image_object_raises_through_to_rgb(photo):
    image = Image.open(io.BytesIO(encoded(photo.resize((300, 200)), "PNG")[:500]))
    with pytest.raises(OSError, match="truncated"):
        to_rgb(image)
