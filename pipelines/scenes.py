"""Generated pictures to try things on: small landscapes in four classes, no two alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

CLASSES = ("dunes", "moonlight", "planets", "sunset")
OVERSAMPLED = 3  # scenes are drawn this much larger and shrunk, so that edges are smooth

Array = np.ndarray[Any, np.dtype[Any]]


def write_corpus(folder: Path, *, num_images: int, num_shards: int, side: int, seed: int = 0) -> None:
    """Writes tar shards in webdataset form: `KEY.png` and `KEY.cls` for each image, classes in turn.

    Args:
        folder: is made; shards are `scenes-000000.tar` onward.
        num_images: how many, over all shards.
        num_shards: how many files.
        side: height and width, pixels.
        seed: decides every picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        with TarWriter(str(folder / f"scenes-{shard:06d}.tar"), mtime=0) as tar:
            for index in range(shard * num_images // num_shards, (shard + 1) * num_images // num_shards):
                label = index % len(CLASSES)
                buffer = io.BytesIO()
                Image.fromarray(scene(CLASSES[label], np.random.default_rng([seed, index]), side)).save(buffer, "PNG")
                tar.write({"__key__": f"{index:06d}", "png": buffer.getvalue(), "cls": str(label).encode()})


def scene(kind: str, random: np.random.Generator, side: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One picture: uint8 [side, side, 3].

    Args:
        kind: one of CLASSES.
        random: decides colours, places and shapes.
        side: height and width, pixels.
    """
    painters: dict[str, Callable[[Array, Array, np.random.Generator], Array]] = {
        "dunes": _dunes, "moonlight": _moonlight, "planets": _planets, "sunset": _sunset,
    }  # fmt: skip
    large = side * OVERSAMPLED
    y, x = np.mgrid[0:large, 0:large].astype(np.float32) / large
    picture = painters[kind](x, y, random).clip(0, 1)
    small = picture.reshape(side, OVERSAMPLED, side, OVERSAMPLED, 3).mean(axis=(1, 3))
    return (small * 255).round().astype(np.uint8)


def _gradient(y: Array, top: Array, bottom: Array) -> Array:
    return top + (bottom - top) * y[..., None]


def _over(picture: Array, mask: Array, colour: Array) -> Array:
    """Paints a colour where a mask in [0, 1] says so."""
    return picture + (colour - picture) * mask.clip(0, 1)[..., None]


def _disc(x: Array, y: Array, cx: float, cy: float, radius: float, soft: float = 0.01) -> Array:
    return (radius - np.hypot(x - cx, y - cy)) / soft + 0.5


def _ridge(x: Array, base: float, height: float, random: np.random.Generator) -> Array:
    """The height of a smooth skyline at each x."""
    phases = random.uniform(0, 2 * np.pi, 3)
    frequencies = np.array([0.9, 1.7, 3.1])
    waves = np.sin(2 * np.pi * frequencies * x[..., None] + phases) / frequencies
    return base + height * waves.sum(axis=-1)


def _jitter(colour: tuple[float, float, float], random: np.random.Generator, by: float = 0.06) -> Array:
    return np.asarray(colour) + random.uniform(-by, by, 3)


def _dunes(x: Array, y: Array, random: np.random.Generator) -> Array:
    picture = _gradient(y, _jitter((0.35, 0.62, 0.90), random), _jitter((0.93, 0.90, 0.80), random))
    picture = _over(
        picture,
        _disc(x, y, random.uniform(0.15, 0.85), random.uniform(0.12, 0.3), random.uniform(0.05, 0.09)),
        np.array([1.0, 0.97, 0.82]),
    )
    for depth, base in enumerate((0.5, 0.65, 0.82)):
        sand = _jitter((0.96 - 0.12 * depth, 0.76 - 0.14 * depth, 0.48 - 0.1 * depth), random, 0.04)
        picture = _over(picture, (y - _ridge(x, base, 0.06, random)) / 0.01, sand)
    return picture


def _moonlight(x: Array, y: Array, random: np.random.Generator) -> Array:
    picture = _gradient(y, _jitter((0.04, 0.06, 0.20), random, 0.03), _jitter((0.24, 0.30, 0.52), random))
    for _ in range(12):
        picture = _over(
            picture, _disc(x, y, random.uniform(0, 1), random.uniform(0, 0.6), 0.008), np.array([0.9, 0.92, 1.0])
        )
    cx, cy, radius = random.uniform(0.2, 0.8), random.uniform(0.15, 0.38), random.uniform(0.08, 0.14)
    bite = _disc(x, y, cx + radius * random.uniform(0.4, 0.8), cy - radius * 0.2, radius)
    picture = _over(picture, _disc(x, y, cx, cy, radius).clip(0, 1) - bite.clip(0, 1), np.array([0.98, 0.96, 0.86]))
    for depth, base in enumerate((0.68, 0.82)):
        hill = _jitter((0.12 - 0.05 * depth, 0.20 - 0.08 * depth, 0.26 - 0.1 * depth), random, 0.02)
        picture = _over(picture, (y - _ridge(x, base, 0.08, random)) / 0.01, hill)
    return picture


def _planets(x: Array, y: Array, random: np.random.Generator) -> Array:
    picture = _gradient(y, _jitter((0.03, 0.02, 0.08), random, 0.02), _jitter((0.10, 0.05, 0.20), random, 0.03))
    for _ in range(14):
        picture = _over(
            picture, _disc(x, y, random.uniform(0, 1), random.uniform(0, 1), 0.008), np.array([0.95, 0.93, 0.85])
        )
    cx, cy, radius = random.uniform(0.35, 0.65), random.uniform(0.35, 0.65), random.uniform(0.2, 0.3)
    hue = np.array([(0.90, 0.55, 0.30), (0.40, 0.65, 0.90), (0.75, 0.45, 0.75), (0.55, 0.80, 0.55)])[random.integers(4)]
    bands = 0.85 + 0.15 * np.sin(2 * np.pi * (y - cy) * random.uniform(4, 8) + random.uniform(0, 6))
    light = (0.75 - 1.6 * ((x - cx) - (cy - y)) * 0.7).clip(0.25, 1.1)
    globe = hue * (bands * light)[..., None]
    mask = _disc(x, y, cx, cy, radius).clip(0, 1)
    picture = picture + (globe - picture) * mask[..., None]
    if random.random() < 0.5:
        tilted = np.hypot((x - cx) + 0.3 * (y - cy), 3.2 * ((y - cy) - 0.3 * (x - cx)))
        ring = (0.03 - np.abs(tilted - 1.55 * radius)) / 0.01
        picture = _over(picture, ring * (1 - mask * (y < cy + 0.3 * (x - cx))), hue * 0.5 + 0.4)
    return picture


def _sunset(x: Array, y: Array, random: np.random.Generator) -> Array:
    horizon = random.uniform(0.55, 0.68)
    picture = _gradient(
        (y / horizon).clip(0, 1), _jitter((0.42, 0.22, 0.48), random), _jitter((0.99, 0.62, 0.32), random)
    )
    cx, radius = random.uniform(0.25, 0.75), random.uniform(0.1, 0.16)
    sun = np.array([1.0, 0.90, 0.55])
    picture = _over(picture, _disc(x, y, cx, horizon - radius * random.uniform(0.0, 0.7), radius), sun)
    sea = _gradient(
        ((y - horizon) / (1 - horizon)).clip(0, 1),
        _jitter((0.72, 0.38, 0.38), random),
        _jitter((0.12, 0.12, 0.32), random),
    )
    below = ((y - horizon) / 0.008).clip(0, 1)
    picture = picture + (sea - picture) * below[..., None]
    width = radius * (0.5 + 1.2 * (y - horizon).clip(0, None) / (1 - horizon))
    ripple = 0.5 + 0.5 * np.sin(y * random.uniform(90, 130) + 3 * np.sin(9 * x))
    glint = (1 - np.abs(x - cx) / width).clip(0, 1) * ripple * 0.8
    return _over(picture, glint * below, sun)
