"""Decoding: every kind of image becomes the right RGB pixels, every broken one an error that names it."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from ood_core.data import decode, to_rgb
from ood_core.errors import ImageError
from PIL import Image, ImageFile


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


def test_integer_images_up_to_255_are_taken_as_8_bit():
    small, large = np.array([[3, 255]], np.int32), np.array([[-5, 255, 256, 0x1234, 1 << 20]], np.int32)
    assert_pixels(to_rgb(Image.fromarray(small)), np.repeat([[[3], [255]]], 3, 2))
    assert_pixels(to_rgb(Image.fromarray(large)), np.repeat([[[0], [0], [1], [0x12], [255]]], 3, 2))


def test_float_images():
    unit, wide = (
        np.array([[0, 0.5, 1, np.nan]], np.float32),
        np.array([[-9, 0.5, 77, 300, np.inf]], np.float32),
    )
    assert_pixels(to_rgb(Image.fromarray(unit)), np.repeat([[[0], [128], [255], [0]]], 3, 2))
    assert_pixels(to_rgb(Image.fromarray(wide)), np.repeat([[[0], [0], [77], [255], [255]]], 3, 2))


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
