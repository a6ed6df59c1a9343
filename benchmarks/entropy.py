"""Bits that a code takes on the disk, against the order-0 entropy of codes that a really trained tokenizer gave.

Codes drawn at random would tell nothing: what compresses below their order-0 entropy is structure, and only real codes have it.
Generated scenes are no stand-in for photographs: four painters repeat themselves, so that plain zstd, which finds repeated runs of codes,
takes about half their entropy, while on CIFAR-10 it takes more than the entropy. Quote figures of real pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import tokenizer
import vqmill
from benchmarks.measure import Line, Target
from benchmarks.stores import ROWS_PER_SHARD, entropy, store_spec, write_store
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed
from pipelines.options import FitFlags
from pipelines.scenes import write_corpus
from pipelines.train_tokenizer import train_tokenizer
from vqmill.layout import encode_zarr_shard, shard_file
from vqmill.spec import CODECS, LevelSpec

SCENES = 4000
STEPS = 400
CONFIG = "[tokenizer]\nhidden_dim = 64\nstart_step = 50\n[fit]\nwarmup_steps = 50\n"  # as in `vqmill demo`: for a minute on 2 cores
TARGET = Target(0.97, at_most=True)


def bits(folder: Path, store: Path | None = None) -> Iterator[Line]:
    """Bits a code on the disk against order-0 entropy: every level, every codec.

    Args:
        folder: for what is made.
        store: a code store to measure; None trains a small tokenizer on CIFAR-10 below $VQMILL_DATA, or on generated scenes.
    """
    path, what = (store, str(store)) if store else _trained(folder)
    codes = vqmill.open_codes(path)
    spec = codes.spec
    for level in spec.levels:
        counts = np.zeros(level.codebook_size, np.int64)
        sizes = dict.fromkeys(CODECS, 0)
        for shard, first in enumerate(range(0, len(codes), spec.rows_per_shard)):
            rows = codes[level.name][first : first + spec.rows_per_shard]
            counts += np.bincount(rows.reshape(-1), minlength=level.codebook_size)
            for codec in CODECS:
                # What the writer would put on the disk, indexes and checksums among it; for the store's own codec, what lies there.
                own = codec == spec.codec
                name = path / shard_file(level.name, shard, len(level.grid))
                sizes[codec] += (
                    name.stat().st_size if own else len(encode_zarr_shard(replace(spec, codec=codec), level, rows))
                )
        limit = entropy(counts)
        for codec, size in sizes.items():
            found = size * 8 / counts.sum()
            title = (
                f"bits a code on the disk over order-0 entropy, {what}, level {level.name} {list(level.grid)}, {codec}"
            )
            # A store takes the smallest codec or one within 2 % of it; the target is for the default.
            yield Line(found / limit, title, f"{found:.3f}", f"{limit:.3f}", TARGET if codec == CODECS[0] else None)


def _trained(folder: Path) -> tuple[Path, str]:
    """A store of codes from a tokenizer that is trained now, and what it was trained on."""
    data = Path(os.environ.get("VQMILL_DATA", "../shared/data")) / "cifar10-wds"
    if data.is_dir():
        corpus, what = f"{data}/train-{{000000..000004}}.tar", "CIFAR-10"
    else:
        write_corpus(folder / "scenes", num_images=SCENES, num_shards=2, side=32)
        corpus, what = str(folder / "scenes"), f"{SCENES:,} generated scenes"
    config = folder / "tokenizer.toml"
    config.write_text(CONFIG)
    flags = FitFlags(steps=STEPS, batch_size=64, learning_rate=2e-3, device="cpu")
    train_tokenizer(corpus, folder / "tokenizer", preset="rgb32", config=config, size=None, holdout=0.05, flags=flags)
    model = tokenizer.load(folder / "tokenizer")
    size = model.config.size
    encoder = SpanEncoder(packed(model), Preprocessing(size=size, channels=model.config.channels), Encoding(), "cpu")
    spans = [span.codes for shard in plan_corpus(corpus).shards for span in encoder.spans(shard)]
    levels = tuple(
        LevelSpec(name, model.config.codebook_size, model.config.grid(name, size)) for name in model.config.level_names
    )
    codes = {level.name: np.concatenate([span[level.name] for span in spans]) for level in levels}
    path = write_store(folder / "codes.zarr", store_spec(levels), codes)
    return (
        path,
        f"rgb32 after {STEPS} steps on {what}, {len(codes[levels[0].name]):,} rows, {ROWS_PER_SHARD:,} a Zarr shard",
    )
