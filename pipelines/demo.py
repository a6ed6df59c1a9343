"""The command `demo`: generated scenes through the whole chain, ending in one picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import priors
import tokenizer
from pipelines.cluster import ray_cluster
from pipelines.corpus.plan import plan_corpus
from pipelines.decode import decode_rows, original_images
from pipelines.options import FitFlags
from pipelines.outputs import require_room
from pipelines.pictures import Panel, code_colours, save_picture, side_by_side
from pipelines.results import Result, plain_console
from pipelines.scenes import CLASSES, write_corpus
from pipelines.tokenize_command import tokenize
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from vqmill import open_codes
from vqmill.errors import UsageError
from vqmill.files import write_whole

IMAGES, SHARDS, SIDE = 2000, 4, 32
SHARD_ROWS = 512
SHOWN = 16
MARKER = "demo.txt"
ROOM_BYTES = 100_000_000
# Smaller than the preset, and short: a demo is over before people look away.
CONFIG = """[tokenizer]
hidden_dim = 64
start_step = 50

[fit]
warmup_steps = 50
"""
TOKENIZER_FLAGS = FitFlags(steps=400, batch_size=64, learning_rate=2e-3, device="cpu")
PRIOR_FLAGS = FitFlags(steps=300, device="cpu")


def demo(out: Path, *, workers: int) -> Result:
    """Runs the command; see `vqmill demo --help`."""
    if workers < 1:
        raise UsageError(f"--workers must be at least 1, got {workers}.")
    if out.exists() and not (out / MARKER).is_file():
        raise UsageError(f"{out}: exists and is not an earlier demo. Choose another --out, or remove it.")
    require_room(out, ROOM_BYTES)
    start = time.monotonic()
    console = plain_console(stderr=True)

    def say(text: str) -> None:
        console.print(f"[{time.monotonic() - start:5.1f} s] {text}")

    write_whole(out / MARKER, b"Made by `vqmill demo`.\n")
    result = _chain(out, workers, say)
    result.lines += [f"made {out / name}" for name in ("scenes/", "tokenizer/", "codes.zarr/", "prior/", "demo.png")]
    result.lines.append(
        f"look at {out / 'demo.png'}: original | reconstruction | codes | samples ({time.monotonic() - start:.0f} s)"
    )
    result.facts = {"out": str(out), "picture": str(out / "demo.png")}
    return result


def _chain(work: Path, workers: int, say: Callable[[str], None]) -> Result:
    corpus = str(work / f"scenes/scenes-{{000000..{SHARDS - 1:06d}}}.tar")
    say(f"drawing {IMAGES:,} small landscapes of {len(CLASSES)} kinds into {SHARDS} tar shards")
    write_corpus(work / "scenes", num_images=IMAGES, num_shards=SHARDS, side=SIDE)
    config = work / "tokenizer.toml"
    config.write_text(CONFIG)
    say(f"training a VQ-VAE-2 ({TOKENIZER_FLAGS.steps} steps)")
    trained = train_tokenizer(
        corpus, work / "tokenizer", preset="rgb32", config=config, size=None, holdout=0.05, flags=TOKENIZER_FLAGS
    )
    with ray_cluster(workers):
        say(f"tokenizing on Ray with {workers} encoder actors")
        made = tokenize(
            corpus, work / "tokenizer", work / "codes.zarr", module=None, size=None, workers=workers, batch_size=32, shard_rows=SHARD_ROWS,
            codec="auto", precision="fp32", device="cpu", dry_run=False,
        )  # fmt: skip
    say(f"training a PixelCNN on the codes ({PRIOR_FLAGS.steps} steps a level)")
    learned = train_prior(
        work / "codes.zarr",
        work / "prior",
        preset="pixelcnn-tiny",
        config=None,
        level="all",
        holdout=0.05,
        flags=PRIOR_FLAGS,
    )
    say("sampling")
    _picture(work, corpus)
    made.lines = trained.lines[:-1] + made.lines[:-1] + learned.lines[:-1]
    return made


def _picture(work: Path, corpus: str) -> None:
    """Original | reconstruction | codes | samples, from what lies on the disk."""
    codes = open_codes(work / "codes.zarr")
    model = tokenizer.load(work / "tokenizer")
    rows = {name: codes[name][:SHOWN] for name in codes.levels}
    prior = priors.load(work / "prior")
    labels = torch.arange(SHOWN) % len(CLASSES)
    drawn = priors.sample(prior, SHOWN, labels, seed=0)
    panels = [
        Panel("original", original_images(plan_corpus(corpus), codes, range(SHOWN), SIDE, 3)),
        Panel("reconstruction", decode_rows(model, rows)),
        Panel("codes: top", code_colours(rows["top"], SIDE)),
        Panel("codes: bottom", code_colours(rows["bottom"], SIDE)),
        Panel(
            "samples, a class in each column",
            decode_rows(model, {name: np.asarray(values) for name, values in drawn.items()}),
        ),
    ]
    settings = {"prior": prior.fingerprint, "tokenizer": model.fingerprint}
    save_picture(work / "demo.png", side_by_side(panels, columns=len(CLASSES), scale=2), settings)
