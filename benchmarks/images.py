"""Image files to squares of 256 pixels: against a full decode by libjpeg-turbo, and against Pillow with its bicubic. Generated pictures only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Line, Target, best, speed
from pipelines.corpus.images import Preprocessing, decode_image

SIZE = 256
QUALITY = 85
CASES = ((500, 375, 0.70, 65), (1024, 768, 0.85, 65), (2000, 1500, 1.0, 50))  # sides, least ratio, least decibels


def decoding(folder: Path) -> Iterator[Line]:
    """JPEGs to 256 pixels on one core, against decoding them whole, and against Pillow with bicubic; likeness in dB."""
    del folder
    torch.set_num_threads(1)
    for width, height, least, decibels in CASES:
        data = _photograph(width, height)
        name = f"{width}x{height} JPEG ({len(data) // 1000} kB) to {SIZE}"
        found = best({
            "ours": lambda data=data: decode_image(data, Preprocessing(SIZE)),
            "whole": lambda data=data: Image.open(io.BytesIO(data)).load(),
            "pillow": lambda data=data: _by_pillow(data),
        })  # fmt: skip
        yield speed(f"{name}, against decoding it whole", found["ours"], found["whole"], least)
        yield speed(f"{name}, against Pillow and bicubic", found["ours"], found["pillow"], 2.0)
        ours = decode_image(data, Preprocessing(SIZE)).pixels.transpose(1, 2, 0).astype(np.float64)
        theirs = np.asarray(_by_pillow(data), np.float64)
        likeness = 10 * np.log10(255**2 / np.mean((ours - theirs) ** 2))
        yield Line(likeness, f"{name}, PSNR", f"{likeness:.1f} dB", "Pillow without draft", Target(decibels))


def _by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _photograph(width: int, height: int) -> bytes:
    """Noise with the spectrum of photographs (amplitude falls as 1/f), as a JPEG."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    fall = 1 / np.maximum(frequency, 1 / max(width, height))

    def layer(power: float) -> np.ndarray:
        values = np.fft.irfft2(np.fft.rfft2(random.normal(size=(height, width))) * fall**power, (height, width))
        return values / values.std()

    light = layer(1.1)
    pixels = np.stack([128 + 45 * light + 15 * layer(1.3) for _ in range(3)], -1)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
