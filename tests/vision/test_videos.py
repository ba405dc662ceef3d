"""Videos: which frames are looked at, out of what files, and what is refused first."""

import base64
import contextlib
import dataclasses
import io
import math
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.config.families.vision_pixels import CLIP_MEAN, CLIP_STD
from octavo.config.families.vision_shapes import PatchPixels, PixelScale, VideoSettings
from octavo.errors import InvalidImageError
from octavo.vision import ImageLimits, VideoReader
from octavo.vision.data_urls import read_video_url
from octavo.vision.headers import read_header

SCALE = PixelScale(1 / 255, CLIP_MEAN, CLIP_STD)
PIXELS = PatchPixels(4, 2, 2, 64, 4096, 3, SCALE)
SETTINGS = VideoSettings(PIXELS, fps=2.0, min_frames=4, max_frames=768)
LIMITS = ImageLimits()


def reader(limits=LIMITS, max_frames=64, **changes):
    return VideoReader(dataclasses.replace(SETTINGS, **changes), limits, max_frames)


def picture(height=24, width=40, seed=0):
    noise = np.random.default_rng(seed)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


def shade(index, size=(40, 24)):
    """A frame that tells its number, whatever a codec does to it."""
    return Image.new("RGB", size, (8 * index % 256,) * 3)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def animation(count, format, duration=100):
    first, *others = [shade(i) for i in range(count)]
    options = {"save_all": True, "append_images": others, "duration": duration, "loop": 0}
    return encoded(first, format, **options | ({"lossless": True} if format == "WEBP" else {}))


def film(count, *, container="mp4", codec="mpeg4", rate=10, size=(64, 48)):
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if codec == "libvpx":
            stream.options = {"auto-alt-ref": "1", "lag-in-frames": "16", "arnr-maxframes": "5"}
        for index in range(count):
            frame = av.VideoFrame.from_image(shade(index, size))
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def numbers(video):
    """Those that `shade` was given."""
    return [round(np.asarray(frame)[..., 0].mean() / 8) for frame in video.frames]


def transformers_indices(total, fps, wanted, depth, fewest, most):
    """`Qwen2VLVideoProcessor.sample_frames` of transformers, whose module needs torchvision."""
    most = math.floor(min(most, total) / depth) * depth
    count = min(max(total / fps * wanted, fewest), most, total)
    count = math.floor(count / depth) * depth
    # Now and then a step is rounded so that `arange` has one more than `count`.
    return torch.arange(0, total, total / count).int().tolist()[:count]


def test_frames_are_sampled_as_transformers_samples_them():
    draw = np.random.default_rng(5)
    for _ in range(400):
        total, most = int(draw.integers(2, 3000)), int(draw.integers(4, 100))
        fps, wanted = draw.choice([10.0, 23.976, 30.0, 60.0]), draw.choice([0.5, 1.0, 2.0, 4.5])
        places = reader(max_frames=most).places(total, float(fps), float(wanted))
        assert places == transformers_indices(total, fps, wanted, 2, 4, most)


def test_a_video_of_one_frame_is_looked_at():
    assert reader().places(1, 10.0) == [0]
    assert reader(max_frames=1).places(100, 10.0) == [0]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_are_sampled_by_their_own_time(format):
    data = animation(30, format)
    header = read_header(data, max_frames=768)
    assert (header.num_frames, header.duration_ms) == (30, 3000)
    video = reader().decode(data)  # 3 s, 2 frames a second
    assert numbers(video) == [0, 5, 10, 15, 20, 25] and video.fps == pytest.approx(2.0)
    assert {frame.size for frame in video.frames} == {(40, 24)}
    every = reader().decode(data, 10.0)
    assert numbers(every) == list(range(30)) and every.fps == pytest.approx(10.0)
    few = reader(max_frames=5).decode(data)
    assert numbers(few) == [0, 7, 15, 22]  # whole patches of two


def test_an_animation_that_says_no_time_is_shown_at_ten_frames_a_second():
    video = reader().decode(animation(20, "GIF", duration=0))
    assert len(video.frames) == 4 and video.fps == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "mpeg4"),
        ("mp4", "libx264"),
        ("webm", "libvpx"),  # with frames that are not shown
        ("webm", "libvpx-vp9"),
        ("matroska", "mpeg4"),
    ],
)
def test_films_are_sampled_by_their_own_time(container, codec):
    video = reader().decode(film(30, container=container, codec=codec))
    assert numbers(video) == [0, 5, 10, 15, 20, 25] and video.fps == pytest.approx(2.0)
    assert {frame.size for frame in video.frames} == {(64, 48)}


def test_frames_are_of_the_size_that_the_model_reads():
    video = reader().decode_frames([encoded(picture(100, 200, seed)) for seed in range(3)], 4.0)
    assert {frame.size for frame in video.frames} == {(88, 40)}  # at most 4096 pixels
    expected = picture(100, 200, 2).resize((88, 40), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(video.frames[2]), np.asarray(expected))
    assert video.fps == 4.0 and reader().decode_frames([encoded(picture())] * 2).fps == 2.0


def test_lists_of_frames_are_bounded_as_a_whole():
    frames = [encoded(picture(seed=seed)) for seed in range(4)]
    assert len(reader().decode_frames(frames).frames) == 4
    for message, limits in {
        "has 4 frames; the limit is 3": ImageLimits(max_frames=3),
        "bytes; the limit is 9000": ImageLimits(max_bytes=9000),
        "3840 pixels; the limit is 3839": ImageLimits(max_video_pixels=4 * 960 - 1),
    }.items():
        with pytest.raises(InvalidImageError, match=message):
            reader(limits).decode_frames(frames)
    with pytest.raises(InvalidImageError, match="has 4 frames; the limit is 2: send fewer"):
        reader(max_frames=2).decode_frames(frames)
    with pytest.raises(InvalidImageError, match="no frames"):
        reader().decode_frames([])
    with pytest.raises(InvalidImageError, match="one size"):
        reader().decode_frames([*frames, encoded(picture(40, 24))])


def png_claiming(width, height):
    """A header alone, of which no decoder could make a picture."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(
        ">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0
    )


def test_headers_are_looked_at_before_anything_is_decoded():
    frames = [png_claiming(24, 24), png_claiming(65535, 65535)]
    with pytest.raises(InvalidImageError, match="65535"):
        reader().decode_frames(frames)
    with pytest.raises(InvalidImageError, match="28800 pixels; the limit is 28799: send fewer"):
        reader(ImageLimits(max_video_pixels=28799)).decode(animation(30, "GIF"))
    with pytest.raises(InvalidImageError, match="more than 9 frames"):
        reader(ImageLimits(max_frames=9)).decode(animation(30, "PNG"))


@pytest.mark.parametrize(
    ("message", "limits"),
    [
        ("bytes; the limit is 1000: cut it", {"max_bytes": 1000}),
        ("64x48 pixels; the limit is 50 on a side", {"max_side": 50}),
        ("30 frames of 64x48 pixels; the limit is 92159", {"max_film_pixels": 30 * 64 * 48 - 1}),
        ("18432 pixels; the limit is 18431", {"max_video_pixels": 6 * 64 * 48 - 1}),
        ("not decoded within", {"max_decoding_s": 1e-9}),
    ],
)
def test_F29_films_are_held_to_limits(message, limits):
    with pytest.raises(InvalidImageError, match=message):
        reader(ImageLimits(**limits)).decode(film(30))


def test_F29_a_film_that_is_damaged_is_refused_or_still_whole():
    whole = film(12)
    expected, num_refused = numbers(reader().decode(whole)), 0
    for end in range(8, len(whole), 97):
        try:
            assert numbers(reader().decode(whole[:end])) == expected
        except InvalidImageError:
            num_refused += 1
    assert num_refused > 10
    noise = np.random.default_rng(3)
    for _ in range(40):
        data = bytearray(whole)
        for place in noise.integers(8, len(data), 6):
            data[place] = noise.integers(0, 256)
        with contextlib.suppress(InvalidImageError):
            assert reader().decode(bytes(data)).frames


def test_what_is_no_video_is_refused_by_name():
    av = pytest.importorskip("av")
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(InvalidImageError, match="no video in it"):
        reader().decode(sound.getvalue())
    with pytest.raises(InvalidImageError, match="coded as mpeg2video; supported: h264"):
        reader().decode(film(4, container="matroska", codec="mpeg2video", rate=25))
    with pytest.raises(InvalidImageError, match="no known format"):
        reader().decode(b"neither of them")


def test_without_pyav_a_film_is_refused_with_what_to_send_instead(monkeypatch):
    data = film(4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InvalidImageError, match=r"data:video/jpeg.*octavo\[video\]"):
        reader().decode(data)


def test_data_urls_hold_a_file_or_frames():
    files = [b"one", b"another"]
    texts = [base64.b64encode(file).decode() for file in files]
    assert read_video_url(f"data:video/mp4;base64,{texts[0]}", max_bytes=99) == b"one"
    assert read_video_url(f"data:video/jpeg;base64,{','.join(texts)}", max_bytes=99) == files
    for url, message in {
        f"data:video/jpeg;base64,{','.join(texts * 9)}": "the video has more than 40 bytes",
        f"data:video/jpeg;base64,{texts[0]},%": "the frame's data URL is no valid base64",
        "file:///etc/passwd": "must be a data URL",
    }.items():
        with pytest.raises(InvalidImageError, match=message):
            read_video_url(url, max_bytes=40)
