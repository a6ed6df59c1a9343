"""The one safe way from the bytes of an image file, or from an array, to a square of pixels.

What a file is, its content decides, never its name. The header is read first: only formats of the allow-list, and no more pixels than the
cap, before any pixel is decoded. Whatever a decoder does with bad bytes becomes a `BadImage` with a reason.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,  # noqa: F401 - each import makes a decoder known; Pillow would otherwise load all it has when one is missing
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
    features,
)

from pipelines.corpus import quiet
from pipelines.corpus.pixels import to_8_bit
from pipelines.corpus.problems import BadImage, Reason
from pipelines.corpus.sniff import name_of_format
from vqmill.errors import CodesError

FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM") if name in Image.OPEN
)
MAX_PIXELS = 100_000_000  # more than any camera takes in one shot; 300 MB as RGB
PILLOW_MAX_PIXELS = (
    178_956_970  # beyond, Pillow's own guard refuses, which we leave in place for the rest of the process
)
DRAFT_FACTOR = 4  # JPEGs this much too large are decoded at a half, quarter or eighth
_ORIENTATION = 0x0112  # the EXIF tag; its values 2 to 8 stand for:
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
quiet.install()


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes a square of pixels.

    The square of the short side is cut from the middle (offset rounded down, before the EXIF orientation is applied) and resized
    (bicubic, antialiased) to `size`; smaller images are enlarged.

    Attributes:
        size: side of the square S, in pixels.
        channels: 1 (grey) or 3 (RGB).
        crop: `center`.
        max_pixels: images whose header claims more are refused; at most Pillow's own limit.
        background: RGB in [0, 255], seen through transparent pixels.
    """

    size: int
    channels: int = 3
    crop: Literal["center"] = "center"
    max_pixels: int = MAX_PIXELS
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise CodesError(f"preprocessing: size must be at least 1 pixel, not {self.size}.")
        if self.channels not in (1, 3):
            raise CodesError(f"preprocessing: channels must be 1 (grey) or 3 (RGB), not {self.channels}.")
        if self.crop != "center":
            raise CodesError(f"preprocessing: crop must be 'center', not {self.crop!r}.")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise CodesError(
                f"preprocessing: max_pixels must be from 1 to {PILLOW_MAX_PIXELS:,}, Pillow's own limit, not {self.max_pixels:,}."
            )
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise CodesError(f"preprocessing: background must be three numbers from 0 to 255, not {self.background}.")

    def to_dict(self) -> dict[str, Any]:
        """Everything that shapes the pixels, as JSON values, with the decoder's version."""
        libraries = ", ".join(
            f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp", "avif", "jpg_2000", "libtiff")
        )
        return {
            **asdict(self),
            "background": list(self.background),
            "interpolation": f"bicubic, antialiased; JPEG drafts from {DRAFT_FACTOR}x",
            "orientation": "exif",
            "color_profiles": "ignored",
            "decoder": f"pillow {PIL.__version__} ({libraries})",
        }


@dataclass(frozen=True, slots=True)
class View:
    """Which square of an image is seen, and whether mirrored.

    Attributes:
        position: along the long side, in [0, 1); None for the middle.
        flip: mirrored left to right, as seen (after the EXIF orientation).
    """

    position: float | None = None
    flip: bool = False


CENTER = View()


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What training may vary.

    Attributes:
        crop: `random` places the square anywhere along the long side.
        flip: mirrors every second image left to right.
    """

    crop: Literal["random", "center"] = "random"
    flip: bool = True

    def __post_init__(self) -> None:
        if self.crop not in ("random", "center"):
            raise CodesError(f"augmentation: crop must be 'random' or 'center', not {self.crop!r}.")

    def view(self, draws: NDArray[np.float64]) -> View:
        """The view for two uniform draws [2] from [0, 1)."""
        return View(float(draws[0]) if self.crop == "random" else None, self.flip and bool(draws[1] < 0.5))


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image ready for a network.

    Attributes:
        pixels: uint8 [C, S, S] in [0, 255].
        width, height: of the whole image as it is seen, in pixels, before cropping and resizing.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int


def prepare(image: bytes | NDArray[np.uint8], preprocessing: Preprocessing, view: View = CENTER) -> Decoded:
    """Decodes a file or prepares an array, whichever the sample holds; see the two functions."""
    if isinstance(image, bytes):
        return decode_image(image, preprocessing, view)
    return prepare_array(image, preprocessing, view)


def decode_image(data: bytes, preprocessing: Preprocessing, view: View = CENTER) -> Decoded:
    """Decodes the bytes of an image file. Safe to call from many threads.

    Of animations the first frame is taken; EXIF orientation is applied; transparent pixels show the background.

    Args:
        data: a whole file.
        preprocessing: size, channels, limits.
        view: which square of it.

    Raises:
        BadImage: it cannot be decoded, with the reason.
    """
    if not data:
        raise BadImage(Reason.EMPTY, "the file has zero bytes")
    with quiet.quiet():
        try:
            return _decode(data, preprocessing, view)
        except BadImage:
            raise
        # Decoders raise nearly anything on bad bytes: SyntaxError, TypeError, struct.error, RuntimeError, MemoryError, ...
        except Exception as error:
            raise _bad_image(data, error) from error


def _decode(data: bytes, preprocessing: Preprocessing, view: View) -> Decoded:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > preprocessing.max_pixels:
            raise BadImage(
                Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels; at most {preprocessing.max_pixels} are decoded"
            )
        if width < 1 or height < 1:
            raise BadImage(Reason.DECODE_ERROR, f"the header gives {width} x {height} pixels")
        scale = 1
        if min(width, height) >= DRAFT_FACTOR * preprocessing.size:
            twice = 2 * preprocessing.size  # the resize still halves at least, so that it decides the quality
            if drafted := image.draft(None, (twice, twice)):
                scale = round(width / drafted[1][2])
        image.load()  # once only: after a failure, a second load() silently returns pixels
        orientation = _orientation(image)
        pixels = to_8_bit(image, preprocessing.channels)
    square = _resize(pixels, (width, height), scale, preprocessing, view, orientation)
    if orientation >= 5:  # the values that swap the sides
        width, height = height, width
    return Decoded(square, width, height)


def prepare_array(array: NDArray[np.uint8], preprocessing: Preprocessing, view: View = CENTER) -> Decoded:
    """Crops and resizes an image that is an array already.

    Args:
        array: uint8 [H, W] (grey) or [H, W, 3] (RGB) in [0, 255].
        preprocessing: size, channels.
        view: which square of it.
    """
    height, width = array.shape[:2]
    if height == width == preprocessing.size and (array.ndim == 2 or preprocessing.channels == 3):
        planes = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        planes = planes[:, :, ::-1] if view.flip else planes
        return Decoded(np.repeat(planes, preprocessing.channels // len(planes), axis=0), width, height)
    pixels = to_8_bit(Image.fromarray(array), preprocessing.channels)
    return Decoded(_resize(pixels, (width, height), 1, preprocessing, view), width, height)


def _resize(
    image: Image.Image,
    whole: tuple[int, int],
    scale: int,
    preprocessing: Preprocessing,
    view: View,
    orientation: int = 1,
) -> NDArray[np.uint8]:
    """Cuts a square and resizes it; only then are orientation, background and mirroring applied, on few pixels.

    Args:
        image: `L`, `RGB` or `RGBA`.
        whole: width and height as stored.
        scale: how many times smaller the image is as a draft; its size is then rounded up.
        preprocessing: size, channels and background.
        view: which square of it.
        orientation: the EXIF value.
    """
    short, spare = min(whole), max(whole) - min(whole)
    offset = spare // 2 if view.position is None else min(int(view.position * (spare + 1)), spare)
    left, top = (offset, 0) if whole[0] > whole[1] else (0, offset)
    box = (left / scale, top / scale, (left + short) / scale, (top + short) / scale)
    # With a box, no more than the square is ever made: resizing the whole of a 1 x 100,000 image first would exhaust the memory.
    square = image.resize((preprocessing.size, preprocessing.size), Image.Resampling.BICUBIC, box=box)
    if square.mode == "RGBA":  # Pillow resizes with premultiplied alpha, so the order does not matter
        ground = Image.new("RGBA", square.size, (*preprocessing.background, 255))
        square = Image.alpha_composite(ground, square).convert("L" if preprocessing.channels == 1 else "RGB")
    if orientation in _TRANSPOSE:
        square = square.transpose(_TRANSPOSE[orientation])
    planes = np.asarray(square)
    planes = planes[None] if planes.ndim == 2 else planes.transpose(2, 0, 1)  # [C, S, S]
    return np.ascontiguousarray(planes[:, :, ::-1] if view.flip else planes)


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 (upright) when there is none or when the EXIF is broken: that spoils no pixel."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _bad_image(data: bytes, error: Exception) -> BadImage:
    """The reason behind what a decoder raised."""
    said = " ".join(str(error).split())[:200]
    known = name_of_format(data)
    if isinstance(error, Image.DecompressionBombError):
        return BadImage(Reason.TOO_MANY_PIXELS, said)
    if known is None:
        return BadImage(Reason.NOT_AN_IMAGE, f"the file begins with {data[:12]!r}")
    if known not in FORMATS:
        return BadImage(Reason.UNSUPPORTED_FORMAT, f"{known} is not read")
    if isinstance(error, PIL.UnidentifiedImageError):
        return BadImage(Reason.DECODE_ERROR, f"{known} with a broken header")
    if isinstance(error, EOFError) or "truncated" in said.lower():
        return BadImage(Reason.TRUNCATED, f"{known}: {said or type(error).__name__}")
    return BadImage(Reason.DECODE_ERROR, f"{known}: {type(error).__name__}{': ' if said else ''}{said}")
