"""Decoding: what is accepted looks right, and what is not is refused before it costs anything."""

import dataclasses
import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import octavo
from octavo.config.families.vision_pixels import CLIP_MEAN, CLIP_STD
from octavo.config.families.vision_shapes import PixelScale, SquarePixels, TiledPixels
from octavo.errors import ConfigError, InvalidImageError, RequestError
from octavo.vision import (
    ImageLimits,
    check_image,
    content_key,
    decode_image,
)

LIMITS = ImageLimits()
SCALE = PixelScale(1 / 255, CLIP_MEAN, CLIP_STD)
SQUARE = SquarePixels(28, 28, 3, SCALE)


def picture(height=24, width=40, seed=0):
    noise = np.random.default_rng(seed)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(height=24, width=40):
    """What lossy formats keep."""
    down, across = np.indices((height, width))
    channels = (5 * down, 5 * across, 2 * (down + across))
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_claiming(width, height, data=b""):
    """A PNG of a few bytes whose header says whatever."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def assert_same(image, expected, *, tolerance=0):
    assert image.mode == "RGB"
    difference = np.asarray(image).astype(int) - np.asarray(expected.convert("RGB")).astype(int)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("GIF", {}, 40),  # 256 colours
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 100, "subsampling": 0}, 8),
        ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}, 8),
    ],
)
def test_each_format_is_read(format, options, tolerance):
    data = encoded(gradient(), format, **options)
    header = check_image(data, LIMITS)
    assert (header.format, header.width, header.height) == (format, 40, 24)
    assert_same(decode_image(data, LIMITS), gradient(), tolerance=tolerance)


@pytest.mark.parametrize("size", [(3, 2), (31, 17), (300, 257), (2, 4097)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_sizes_are_those_that_pillow_finds(format, size):
    image = Image.new("RGB", size, (9, 99, 199))
    for options in ({}, {"lossless": True}) if format == "WEBP" else ({},):
        header = check_image(encoded(image, format, **options), LIMITS)
        assert (header.width, header.height, header.num_frames) == (*size, 1)


def test_every_mode_becomes_rgb():
    image = picture()
    gray = image.convert("L")
    assert_same(decode_image(encoded(gray), LIMITS), gray)
    assert_same(decode_image(encoded(image.convert("1")), LIMITS), image.convert("1"))
    palette = image.convert("P")
    assert_same(decode_image(encoded(palette), LIMITS), palette)
    see_through = encoded(palette, transparency=bytes(range(256)))
    assert_same(decode_image(see_through, LIMITS), palette)  # transparency is dropped
    with_alpha = image.copy()
    with_alpha.putalpha(gray)
    assert_same(decode_image(encoded(with_alpha), LIMITS), image)
    assert_same(decode_image(encoded(with_alpha.convert("LA")), LIMITS), with_alpha.convert("LA"))
    cmyk = image.convert("CMYK")
    again = Image.open(io.BytesIO(encoded(cmyk, "JPEG", quality=100, subsampling=0)))
    assert again.mode == "CMYK"
    data = encoded(cmyk, "JPEG", quality=100, subsampling=0)
    assert_same(decode_image(data, LIMITS), again, tolerance=1)
    assert_same(decode_image(data, LIMITS), cmyk, tolerance=12)


def test_sixteen_bits_of_gray_are_scaled_and_not_cut_off():
    deep = np.linspace(0, 65535, 24 * 40).astype(np.uint16).reshape(24, 40)
    image = decode_image(encoded(Image.fromarray(deep)), LIMITS)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], deep >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_the_right_way_up(format, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), format, exif=exif)
    header = check_image(data, LIMITS)
    assert (header.width, header.height) == (40, 24)  # as stored
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data, LIMITS)
    assert decoded.size == ((24, 40) if orientation > 4 else (40, 24))
    assert_same(decoded, expected)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_read_and_frames_are_counted(format):
    frames = [Image.new("RGB", (8, 6), (shade, 20, 30)) for shade in (10, 120, 230)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=50)
    assert check_image(data, LIMITS).num_frames == 3
    assert_same(decode_image(data, LIMITS), frames[0], tolerance=12)
    with pytest.raises(InvalidImageError, match="more than 2 frames"):
        decode_image(data, ImageLimits(max_frames=2))


def test_ten_thousand_frames_are_refused_without_counting_them_all():
    screen = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 4, 4, 0) + b"\x02\x02\x4c\x01\x00"
    with pytest.raises(InvalidImageError, match="frames"):
        decode_image(screen + 10_000 * frame + b"\x3b", LIMITS)


def test_a_gif_frame_beyond_its_screen_counts():
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\x00"
    data = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0) + frame + b"\x3b"
    with pytest.raises(InvalidImageError, match="60000x60000"):
        decode_image(data, LIMITS)


BAD = {
    "one pixel": (encoded(Image.new("RGB", (1, 1))), "1x1 pixels; a side has at least 2"),
    "a header of 65535x65535": (png_claiming(65535, 65535), "65535x65535 pixels; the limit"),
    "a negative size": (png_claiming(2**32 - 1, 2**32 - 1), "pixels; the limit"),
    "long and thin": (png_claiming(3, 20_000), "3x20000 pixels; the limit is 16384 on a side"),
    "no data": (png_claiming(24, 24), "PNG cannot be decoded"),
    "nothing": (b"", "no known format"),
    "text": (b"data:image/png;base64,aGVsbG8=", "no known format"),
    "another format": (encoded(picture(), "BMP"), "no known format; supported: PNG, JPEG"),
    "a TIFF": (encoded(picture(), "TIFF"), "no known format"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no known format"),
    "a PNG's first bytes": (b"\x89PNG\r\n\x1a\n\x00\x00", "header ends early"),
    "a JPEG's first bytes": (b"\xff\xd8\xff\xe0", "header ends early"),
    "a JPEG without a frame": (b"\xff\xd8\xff\xe0\x00\x02\x00\x00", "no frame header"),
    "a GIF without a picture": (b"GIF89a" + bytes(7) + b"\x3b", "no picture"),
    "a WebP without a picture": (b"RIFF\x04\x00\x00\x00WEBP", "no picture"),
    "a thousand scans": (
        encoded(picture(), "JPEG")[:-2] + 1000 * b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00",
        "more than 100 scans",
    ),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_what_is_no_picture_is_refused_by_name(data, message):
    with pytest.raises(InvalidImageError, match=message) as caught:
        decode_image(data, LIMITS)
    assert isinstance(caught.value, RequestError) and caught.value.code == "invalid_image"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_file_cut_anywhere_is_refused_or_still_whole(format):
    data = encoded(picture(), format)
    whole = np.asarray(decode_image(data, LIMITS))
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 60)):
        try:
            image = decode_image(data[:length], LIMITS)
        except InvalidImageError:
            refused += 1
        else:  # what is missing was behind the pixels
            np.testing.assert_array_equal(np.asarray(image), whole)
    assert refused > 50


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP"])
def test_damage_is_refused_or_makes_a_picture_within_the_limits(format):
    data = bytearray(encoded(picture(), format))
    noise = np.random.default_rng(5)
    limits = ImageLimits(max_side=2000, max_pixels=10**6)
    for _ in range(300):
        damaged = bytearray(data)
        for place in noise.integers(0, len(data), 3):
            damaged[place] = noise.integers(0, 256)
        try:
            image = decode_image(bytes(damaged), limits)
        except InvalidImageError:
            continue
        assert image.mode == "RGB" and image.width * image.height <= limits.max_pixels


def test_a_bomb_costs_no_memory():
    # 2.5 GB of zeros in some 2.5 MB; the header alone tells.
    rows = zlib.compress(bytes(2**24), 9)
    bomb = png_claiming(29_000, 29_000, rows * 16)
    tracemalloc.start()
    with pytest.raises(InvalidImageError, match="29000x29000"):
        decode_image(bomb, LIMITS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_file_that_is_too_long_is_refused_before_it_is_looked_at():
    data = encoded(picture())
    with pytest.raises(InvalidImageError, match=f"{len(data)} bytes; the limit is 100"):
        decode_image(data, ImageLimits(max_bytes=100))


def test_a_text_chunk_that_blows_up_is_refused():
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2**26, zip=True)
    data = encoded(picture(), pnginfo=info)
    assert len(data) < 200_000
    with pytest.raises(InvalidImageError, match="cannot be decoded"):
        decode_image(data, LIMITS)


def test_limits_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="max_side=0"):
        ImageLimits(max_side=0)
    with pytest.raises(ConfigError, match="Pillow"):
        ImageLimits(max_pixels=10**9)


def test_the_page_has_the_defaults():
    page = (Path(octavo.__file__).parents[1] / "docs" / "vision.md").read_text()
    fields = dataclasses.asdict(LIMITS)
    assert f"| `max_bytes` | {fields.pop('max_bytes') >> 20} MiB |" in page
    assert f"| {fields.pop('max_side'):,} and {fields.pop('min_side')} |" in page
    for name, value in fields.items():
        assert f"| `{name}` | {value:,} |" in page


def test_equal_bytes_of_another_shape_or_mode_or_setting_have_another_name():
    numbers = bytes(range(96))
    contents = [
        ([Image.frombytes("RGB", (8, 4), numbers)], SQUARE),
        ([Image.frombytes("RGB", (4, 8), numbers)], SQUARE),
        ([Image.frombytes("RGB", (32, 1), numbers)], SQUARE),
        ([Image.frombytes("L", (12, 8), numbers)], SQUARE),
        ([Image.frombytes("L", (8, 12), numbers)], SQUARE),
        ([Image.frombytes("RGB", (4, 4), half) for half in (numbers[:48], numbers[48:])], SQUARE),
        ([Image.frombytes("RGB", (4, 4), half) for half in (numbers[48:], numbers[:48])], SQUARE),
        ([Image.frombytes("RGB", (8, 4), numbers)], SquarePixels(28, 29, 3, SCALE)),
        ([Image.frombytes("RGB", (8, 4), numbers)], SquarePixels(28, None, 3, SCALE)),
        ([Image.frombytes("RGB", (8, 4), numbers)], SquarePixels(28, 28, 2, SCALE)),
        ([Image.frombytes("RGB", (8, 4), numbers)], TiledPixels(28, ((28, 28),), 3, SCALE)),
        ([Image.frombytes("RGB", (8, 4), numbers[::-1])], SQUARE),
    ]
    keys = {content_key(*content) for content in contents}
    assert len(keys) == len(contents)
    assert content_key(*contents[0]) == content_key(
        [Image.frombytes("RGB", (8, 4), numbers)], SquarePixels(28, 28, 3, SCALE)
    )
    with pytest.raises(ValueError, match="convert to RGB"):
        content_key([picture().convert("P")], SQUARE)


def test_the_same_picture_in_two_formats_has_one_name():
    png, webp = (
        decode_image(encoded(picture(), format, **options), LIMITS)
        for format, options in (("PNG", {}), ("WEBP", {"lossless": True}))
    )
    assert content_key([png], SQUARE) == content_key([webp], SQUARE)


def test_the_surface_imports_neither_torch_nor_numpy_nor_pillow():
    code = (
        "import sys; import octavo.vision\n"
        "print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
