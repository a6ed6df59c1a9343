"""Decoding: every kind of pixels, every kind of bad bytes, any number of threads."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipelines.corpus import Augmentation, BadImage, Preprocessing, Reason, View, decode_image, prepare_array
from pipelines.corpus.images import MAX_PIXELS
from vqmill.errors import CodesError

SAME = Preprocessing(8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_pixels_of_the_right_size_come_through_untouched() -> None:
    pixels = noise(8, 8)
    decoded = decode_image(encode(Image.fromarray(pixels)), SAME)
    assert np.array_equal(decoded.pixels, pixels.transpose(2, 0, 1))
    assert (decoded.width, decoded.height, decoded.pixels.dtype) == (8, 8, np.uint8)
    assert decoded.pixels.flags.c_contiguous


@pytest.mark.parametrize(("height", "width"), [(8, 13), (13, 8), (8, 9)])
def test_the_centre_is_pinned(height: int, width: int) -> None:
    pixels = noise(height, width)
    top, left = (height - 8) // 2, (width - 8) // 2
    expected = pixels[top : top + 8, left : left + 8].transpose(2, 0, 1)
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels)), SAME).pixels, expected)
    assert np.array_equal(prepare_array(pixels, SAME).pixels, expected)


def test_resizing_is_that_of_pillow_on_the_square() -> None:
    pixels = noise(40, 61)
    expected = Image.fromarray(pixels).crop((10, 0, 50, 40)).resize((8, 8), Image.Resampling.BICUBIC)
    found = decode_image(encode(Image.fromarray(pixels)), SAME).pixels.transpose(1, 2, 0)
    assert (
        np.abs(found[:, 1:-1].astype(int) - np.asarray(expected)[:, 1:-1]).max() <= 1
    )  # at its edges the box sees its surroundings


def test_views_move_and_mirror() -> None:
    pixels = noise(8, 20)
    data = encode(Image.fromarray(pixels))
    for position, left in ((0.0, 0), (0.999, 12), (0.5, 6)):
        for flip in (False, True):
            found = decode_image(data, SAME, View(position, flip)).pixels
            expected = pixels[:, left : left + 8].transpose(2, 0, 1)
            assert np.array_equal(found, expected[:, :, ::-1] if flip else expected)
            assert np.array_equal(found, prepare_array(pixels, SAME, View(position, flip)).pixels)


def test_augmentation_options() -> None:
    assert Augmentation("center", flip=False).view(np.array([0.1, 0.1])) == View()
    assert Augmentation("random", flip=False).view(np.array([0.1, 0.1])) == View(0.1)
    assert Augmentation("center", flip=True).view(np.array([0.1, 0.1])) == View(flip=True)
    assert Augmentation("center", flip=True).view(np.array([0.1, 0.9])) == View()
    with pytest.raises(CodesError):
        Augmentation("middle")  # pyright: ignore[reportArgumentType]


def test_grey_and_colour() -> None:
    pixels = noise(8, 8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels)), Preprocessing(8, 1)).pixels, grey[None])
    assert np.array_equal(decode_image(encode(Image.fromarray(grey)), SAME).pixels, np.repeat(grey[None], 3, 0))
    for channels in (1, 3):
        prepared = prepare_array(grey, Preprocessing(8, channels)).pixels
        assert np.array_equal(prepared, np.repeat(grey[None], channels, 0))
        assert prepared.flags.writeable
    assert np.array_equal(prepare_array(pixels, Preprocessing(8, 1)).pixels, grey[None])


def test_transparent_pixels_show_the_background() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (255, 0, 0, 255)
    rgba = Image.fromarray(pixels)
    palette = Image.fromarray((np.arange(64).reshape(8, 8) >= 32).astype(np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 0])
    for data in (
        encode(rgba),
        encode(rgba, "WEBP", lossless=True),
        encode(rgba, "TIFF"),
        encode(palette, transparency=1),
    ):
        found = decode_image(data, SAME).pixels
        assert found[:, :4].reshape(3, -1).T.tolist() == [[255, 0, 0]] * 32
        assert (found[:, 4:] == 255).all()
        green = decode_image(data, replace(SAME, background=(0, 200, 0))).pixels
        assert green[:, 7, 7].tolist() == [0, 200, 0]
    assert decode_image(encode(rgba.convert("LA")), Preprocessing(8, 1)).pixels[0, 7, 7] == 255


def test_16_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    for data in (encode(Image.fromarray(values)), encode(Image.fromarray(values), "TIFF")):
        assert np.array_equal(decode_image(data, Preprocessing(8, 1)).pixels[0], expected)
    header = b"P5 8 8 65535\n" + values.astype(">u2").tobytes()
    assert np.abs(decode_image(header, Preprocessing(8, 1)).pixels[0].astype(int) - expected).max() <= 1


def test_floats_are_stretched_between_their_extremes() -> None:
    values = np.linspace(-3, 5, 64, dtype=np.float32).reshape(8, 8)
    found = decode_image(encode(Image.fromarray(values), "TIFF"), Preprocessing(8, 1)).pixels[0]
    assert (found.min(), found.max()) == (0, 255)
    values[0, 0], values[0, 1] = np.nan, np.inf
    assert decode_image(encode(Image.fromarray(values), "TIFF"), Preprocessing(8, 1)).pixels[0, 0, :2].tolist() == [
        0,
        255,
    ]
    flat = Image.fromarray(np.full((8, 8), 7, np.float32))
    assert (decode_image(encode(flat, "TIFF"), Preprocessing(8, 1)).pixels == 0).all()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "TIFF"), ("1", "PNG"), ("P", "GIF")],
)
def test_other_modes_become_rgb(mode: str, kind: str) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    lab = Image.new("LAB", (8, 8), (138, 209, 195))  # L 54, a 81, b 70
    image = lab if mode == "LAB" else red.convert(mode)
    expected = image.convert("RGB").getpixel((4, 4)) if mode == "1" else (255, 0, 0)
    found = decode_image(encode(image, kind), SAME).pixels[:, 4, 4].astype(int)
    assert np.abs(found - np.array(expected)).max() <= 12
    assert decode_image(encode(image, kind), Preprocessing(8, 1)).pixels.shape == (1, 8, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    from PIL import ImageOps

    pixels = noise(8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(pixels), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data, SAME)
    assert (decoded.width, decoded.height) == upright.size
    left, top = (upright.width - 8) // 2, (upright.height - 8) // 2
    expected = np.asarray(upright.crop((left, top, left + 8, top + 8))).transpose(2, 0, 1)
    assert np.array_equal(decoded.pixels, expected)
    assert np.array_equal(decode_image(data, SAME, View(flip=True)).pixels, expected[:, :, ::-1])


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_mean_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(8, 12)
    decoded = decode_image(encode(Image.fromarray(pixels), exif=exif), SAME)
    assert (decoded.width, decoded.height) == (12, 8)
    assert np.array_equal(decoded.pixels, pixels[:, 2:10].transpose(2, 0, 1))


@pytest.mark.parametrize(("width", "height"), [(97, 64), (64, 97), (33, 32), (17, 17), (1001, 700)])
def test_a_draft_looks_like_the_whole(width: int, height: int) -> None:
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1).astype(np.uint8)
    image = Image.fromarray(smooth)
    for size in (2, 4):
        drafted = decode_image(encode(image, "JPEG", quality=95), Preprocessing(size))
        whole = decode_image(encode(image), Preprocessing(size))
        assert (drafted.width, drafted.height) == (width, height)
        assert np.abs(drafted.pixels.astype(int) - whole.pixels).max() <= 12


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        data = encode(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert decode_image(data, SAME).pixels[:, 0, 0].tolist() == [255, 0, 0], kind


def test_extreme_shapes_stay_small() -> None:
    data = encode(Image.new("L", (60_000, 1), 7))
    assert (decode_image(data, Preprocessing(256)).pixels == 7).all()


def test_bad_bytes_have_reasons(make_picture: Callable[..., bytes]) -> None:
    good = {kind: make_picture(1, 64, 64, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")}
    cases = {
        Reason.EMPTY: [b""],
        Reason.NOT_AN_IMAGE: [b"<html></html>", b"\0" * 100, b"BMW is a make of cars"],
        Reason.UNSUPPORTED_FORMAT: [
            b"\xff\x0a" + bytes(30),
            b"<svg xmlns='x'/>",
            b"8BPS" + bytes(30),
            b"%!PS-Adobe",
            bytes(4) + b"ftypheic" + bytes(9),
        ],
        Reason.TRUNCATED: [
            good["JPEG"][:-300],
            good["PNG"][: len(good["PNG"]) // 2],
            good["BMP"][:-300],
            good["PPM"][:-300],
        ],
        Reason.DECODE_ERROR: [b"\x89PNG\r\n\x1a\n" + bytes(50), b"\xff\xd8\xff" + bytes(99)],
    }
    for reason, files in cases.items():
        for data in files:
            with pytest.raises(BadImage) as raised:
                decode_image(data, SAME)
            assert raised.value.reason is reason, (raised.value, data[:20])
            assert raised.value.detail


def test_no_bytes_raise_anything_but_bad_image(make_picture: Callable[..., bytes]) -> None:
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"):
        good = make_picture(2, 24, 24, kind)
        for _ in range(40):
            data = np.frombuffer(good, np.uint8).copy()
            data[random.integers(0, min(len(data), 200), 3)] = random.integers(0, 256, 3)
            try:
                decoded = decode_image(data.tobytes(), SAME)
            except BadImage:
                continue
            assert decoded.pixels.shape == (3, 8, 8)


def test_the_pixel_cap_holds_before_decoding() -> None:
    data = encode(Image.new("1", (300, 200)))
    with pytest.raises(BadImage, match="300 x 200") as raised:
        decode_image(data, Preprocessing(8, max_pixels=59_999))
    assert raised.value.reason is Reason.TOO_MANY_PIXELS
    assert decode_image(data, Preprocessing(8, max_pixels=60_000)).width == 300
    bomb = bytearray(encode(Image.new("L", (1, 1)), "BMP"))
    bomb[18:26] = np.array([20_000, 20_000], "<i4").tobytes()
    with pytest.raises(BadImage) as raised:
        decode_image(bytes(bomb), SAME)
    assert raised.value.reason is Reason.TOO_MANY_PIXELS


def remarkable() -> bytes:
    """A sound JPEG with an EXIF table cut off after its head, about which Pillow has something to say."""
    return encode(Image.new("L", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05")


def test_remarks_on_a_file_neither_escape_nor_spoil_it() -> None:
    data = remarkable()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data)).getexif()
        assert heard, "Pillow's own users still hear it"
        heard.clear()
        decode_image(data, SAME)
        assert not heard
    with ThreadPoolExecutor(8) as threads:  # warnings are errors here
        found = list(threads.map(lambda _: decode_image(data, SAME).pixels, range(200)))
    assert all((pixels == 0).all() for pixels in found)
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(data)).getexif()


def test_threads_give_the_same_pixels(make_picture: Callable[..., bytes]) -> None:
    files = [make_picture(seed, 40, 30, kind) for seed in range(10) for kind in ("JPEG", "PNG", "WEBP")]
    alone = [decode_image(data, SAME).pixels for data in files]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda data: decode_image(data, SAME).pixels, files))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"channels": 2},
        {"crop": "left"},
        {"fit": "stretch"},
        {"max_memory_bytes": 1},
        {"max_pixels": 0},
        {"max_pixels": 10**9},
        {"background": (0, 0, 256)},
        {"background": (0, 0)},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(CodesError, match="preprocessing"):
        Preprocessing(**{"size": 8, **options})


def test_the_record_says_all_that_shapes_pixels() -> None:
    import PIL

    record = Preprocessing(8, background=(1, 2, 3)).to_dict()
    assert record["size"] == 8
    assert record["background"] == [1, 2, 3]
    assert record["max_pixels"] == MAX_PIXELS
    assert PIL.__version__ in record["decoder"]
    assert "bicubic" in record["interpolation"]


@pytest.mark.parametrize(("height", "width"), [(8, 4), (4, 8), (8, 5), (30, 60)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_pad_shows_the_whole_image_in_the_middle(height: int, width: int, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(height, width)
    padded = Preprocessing(8, fit="pad", background=(1, 2, 3))
    data = encode(Image.fromarray(pixels), exif=exif)
    found = decode_image(data, padded).pixels
    small = np.asarray(Image.fromarray(pixels).resize((width * 8 // max(height, width), height * 8 // max(height, width)), Image.Resampling.BICUBIC))  # fmt: skip
    expected = np.empty((8, 8, 3), np.uint8)
    expected[:] = (1, 2, 3)
    top, left = (8 - small.shape[0]) // 2, (8 - small.shape[1]) // 2
    expected[top : top + small.shape[0], left : left + small.shape[1]] = small
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    if (8 - small.shape[0]) % 2 == (
        8 - small.shape[1]
    ) % 2 == 0 or orientation == 1:  # else its middle is a pixel aside
        assert np.abs(found.transpose(1, 2, 0).astype(int) - expected).max() <= 1
    if orientation == 1:
        assert np.array_equal(prepare_array(pixels, padded).pixels, found)
    assert np.array_equal(decode_image(data, padded, View(0.9)).pixels, found)
    assert padded.to_dict()["fit"] == "pad"


def test_the_kind_of_a_file_is_told() -> None:
    kinds = {"JPEG L": ("L", "JPEG"), "PNG RGBA": ("RGBA", "PNG"), "GIF P": ("P", "GIF"), "TIFF CMYK": ("CMYK", "TIFF")}
    for kind, (mode, form) in kinds.items():
        assert decode_image(encode(Image.new(mode, (8, 8)), form), SAME).kind == kind


def test_the_resize_is_pillows_within_65_decibels() -> None:
    y, x = np.mgrid[:375, :500]
    waves = np.stack([128 + 60 * np.sin(x / 9 + y / 31) + 30 * np.sin(x * y / 4000) + 9 * c for c in range(3)], -1)
    data = encode(Image.fromarray((waves + noise(375, 500) / 32).astype(np.uint8)), "JPEG", quality=90)
    image = Image.open(io.BytesIO(data)).crop((62, 0, 437, 375))
    expected = np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC), np.float64)
    found = decode_image(data, Preprocessing(256)).pixels.transpose(1, 2, 0)
    assert 10 * np.log10(255**2 / np.mean((found - expected) ** 2)) >= 65


def test_large_images_are_cut_out_in_bands() -> None:
    pixels = noise(2400, 2500)  # more than one block of Pillow's memory
    found = decode_image(encode(Image.fromarray(pixels), "BMP"), Preprocessing(2400)).pixels
    assert np.array_equal(found, pixels[:, 50:2450].transpose(2, 0, 1))
