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
from pipelines.corpus.cost import check_cost
from pipelines.corpus.header import check_header
from pipelines.corpus.pixels import to_8_bit
from pipelines.corpus.problems import BadImage, Reason
from pipelines.corpus.sniff import name_of_format
from pipelines.corpus.square import INTERPOLATION, Fit, make_square, swaps_sides, visible_box
from vqmill.errors import CodesError

FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM") if name in Image.OPEN
)
MAX_PIXELS = 100_000_000  # more than any camera takes in one shot
MAX_MEMORY_BYTES = 200_000_000  # 31 megapixels of PNG, 12 of WebP; hundreds of a JPEG that is drafted
PILLOW_MAX_PIXELS = (
    178_956_970  # beyond, Pillow's own guard refuses, which we leave in place for the rest of the process
)
DRAFT_LEAST = 2.5  # what is left for the resize, so that it decides the quality
DRAFT_FACTOR = 4  # JPEGs this much too large are decoded at a half, quarter or eighth
TORCH_WANTS_MEMORY = "DefaultCPUAllocator"  # what its RuntimeError says then
_ORIENTATION = 0x0112  # the EXIF tag
quiet.install()


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes a square of pixels.

    With `fit="crop"` the square of the short side is cut from the middle (offset rounded down) and resized (bicubic, antialiased) to
    `size`; with `fit="pad"` the whole image is resized until its long side is `size`, and put into the middle of a square of background.
    Smaller images are enlarged.

    Attributes:
        size: side of the square S, in pixels.
        channels: 1 (grey) or 3 (RGB).
        fit: `crop` or `pad`.
        crop: `center`.
        max_pixels: images whose header claims more are refused; at most Pillow's own limit.
        max_memory_bytes: images that would take more to decode are refused; reckoned from the header.
        background: RGB in [0, 255], seen through transparent pixels and, with `pad`, beside the image.
    """

    size: int
    channels: int = 3
    fit: Fit = "crop"
    crop: Literal["center"] = "center"
    max_pixels: int = MAX_PIXELS
    max_memory_bytes: int = MAX_MEMORY_BYTES
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise CodesError(f"preprocessing: size must be at least 1 pixel, not {self.size}.")
        if self.channels not in (1, 3):
            raise CodesError(f"preprocessing: channels must be 1 (grey) or 3 (RGB), not {self.channels}.")
        if self.fit not in ("crop", "pad"):
            raise CodesError(f"preprocessing: fit must be 'crop' or 'pad', not {self.fit!r}.")
        if self.crop != "center":
            raise CodesError(f"preprocessing: crop must be 'center', not {self.crop!r}.")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise CodesError(
                f"preprocessing: max_pixels must be from 1 to {PILLOW_MAX_PIXELS:,}, Pillow's own limit, not {self.max_pixels:,}."
            )
        if self.max_memory_bytes < 1_000_000:
            raise CodesError(
                f"preprocessing: max_memory_bytes must be at least 1,000,000, not {self.max_memory_bytes:,}."
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
            "interpolation": f"{INTERPOLATION}; JPEG drafts from {DRAFT_FACTOR}x, leaving {DRAFT_LEAST}x",
            "orientation": "exif",
            "color_profiles": "ignored",
            "decoder": f"pillow {PIL.__version__} ({libraries})",
        }


@dataclass(frozen=True, slots=True)
class View:
    """Which square of an image is seen, and whether mirrored.

    Attributes:
        position: along the long side, in [0, 1); None for the middle. Nothing is cut off with `fit="pad"`, so it does not matter there.
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
        kind: format and mode as Pillow names them, such as `JPEG RGB` or `PNG I;16`.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    kind: str


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
    check_header(data)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        kind = f"{image.format} {image.mode}"
        _check_size(width, height, preprocessing.max_pixels)
        scale = _draft(image, preprocessing)
        visible = min(image.size) ** 2 if preprocessing.fit == "crop" else image.width * image.height
        check_cost(image, data, (width, height), visible, preprocessing.max_memory_bytes)
        if image.format in ("JPEG", "MPO"):
            image.decodermaxblock = max(
                len(data), ImageFile.MAXBLOCK
            )  # in one piece, so that no rest is put together with the next
        image.load()  # once only: after a failure, a second load() silently returns pixels
        orientation = _orientation(image)
        pixels = to_8_bit(image, preprocessing.channels)
    box = visible_box((width, height), preprocessing.fit, view.position, orientation)
    scaled = (box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale)
    square = make_square(
        pixels, scaled, preprocessing.size, preprocessing.background, preprocessing.channels, orientation, view.flip
    )
    if swaps_sides(orientation):
        width, height = height, width
    return Decoded(square, width, height, kind)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels; at most {max_pixels} are decoded")
    if width < 1 or height < 1:
        raise BadImage(Reason.DECODE_ERROR, f"the header gives {width} x {height} pixels")


def _draft(image: ImageFile.ImageFile, preprocessing: Preprocessing) -> int:
    """Has a large JPEG decoded at a half, quarter or eighth; gives by what its sides are divided, rounded up."""
    side = min(image.size) if preprocessing.fit == "crop" else max(image.size)
    if side < DRAFT_FACTOR * preprocessing.size:
        return 1
    least = int(DRAFT_LEAST * preprocessing.size)
    width, height = image.size
    target = (least, least) if preprocessing.fit == "crop" else (least * width // side, least * height // side)
    drafted = image.draft(None, (max(target[0], 1), max(target[1], 1)))
    return round(width / drafted[1][2]) if drafted else 1


def prepare_array(array: NDArray[np.uint8], preprocessing: Preprocessing, view: View = CENTER) -> Decoded:
    """Crops or pads, and resizes, an image that is an array already.

    Args:
        array: uint8 [H, W] (grey) or [H, W, 3] (RGB) in [0, 255].
        preprocessing: size, channels.
        view: which square of it.
    """
    height, width = array.shape[:2]
    if array.ndim == 3 and preprocessing.channels == 1:
        array = np.asarray(Image.fromarray(array).convert("L"))
    box = visible_box((width, height), preprocessing.fit, view.position)
    square = make_square(
        array, box, preprocessing.size, preprocessing.background, preprocessing.channels, flip=view.flip
    )
    return Decoded(square, width, height, "array L" if array.ndim == 2 else "array RGB")


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 (upright) when there is none or when the EXIF is broken: that spoils no pixel."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _bad_image(data: bytes, error: Exception) -> BadImage:
    """The reason behind what a decoder raised."""
    said = " ".join(str(error).split())[:200]
    known = name_of_format(data)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and TORCH_WANTS_MEMORY in said):
        return BadImage(Reason.OUT_OF_MEMORY, f"{known}: decoding it took more memory than there was for it")
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
