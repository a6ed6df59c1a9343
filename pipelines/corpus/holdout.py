"""Which samples are never trained on: a function of their keys, so that every stage of a project holds out the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import InputShard, Plan
from pipelines.corpus.problems import BadImage, CorpusError
from pipelines.corpus.samples import SampleRef, list_samples, load_sample
from vqmill.errors import CodesError

CERTAIN = 64  # with this many samples expected, a hold-out is empty once in e^64 corpora
_WHOLE = 2**64
Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def hash_of_key(key: str) -> int:
    """A number in [0, 2^64) that is the same on every machine (Python's own `hash` is not)."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def threshold(fraction: float) -> int:
    """Keys whose hashes lie below are a share of so much, in [0, 1), of all keys that there could be."""
    return int(fraction * _WHOLE)


def key_hashes(keys: Iterable[str]) -> Hashes:
    """`hash_of_key` of N keys: uint64 [N]."""
    return np.array([hash_of_key(str(key)) for key in keys], np.uint64)


def holdout_threshold(hashes: Hashes, fraction: float) -> np.uint64:
    """Samples of a store whose hashes lie below are held out: so large a share, and one sample at least."""
    return max(np.uint64(threshold(fraction)), hashes.min() + np.uint64(1))


def in_holdout(key: str, fraction: float) -> bool:
    """Whether a sample is held out.

    Args:
        key: of the sample; samples that share a key are held out together.
        fraction: of all samples, in [0, 1).
    """
    return hash_of_key(key) < fraction * _WHOLE


@dataclass(frozen=True, slots=True)
class Holdout:
    """The hold-out of one corpus.

    Attributes:
        below: keys whose hash is below this are held out.
        forced: the fraction held out no usable sample, so the one with the smallest hash was taken.
    """

    below: int
    forced: bool = False

    def __contains__(self, key: str) -> bool:
        return hash_of_key(key) < self.below


def choose_holdout(plan: Plan, preprocessing: Preprocessing, fraction: float) -> Holdout:
    """The hold-out of a corpus: never without a usable sample, unless the fraction is 0.

    In a small corpus the fraction may catch nothing, or nothing that decodes. Then the decodable sample with the smallest hash is held out
    alone. Training and validation both ask this function, so no sample is in both.

    Args:
        plan: the corpus.
        preprocessing: as for training: decides what decodes.
        fraction: of all samples, in [0, 1); 0 holds out nothing.

    Raises:
        CodesError: the fraction is out of range.
        CorpusError: there are not two usable samples to divide, or the fraction leaves none to train on.
    """
    if not 0 <= fraction < 1:
        raise CodesError(f"hold-out: the fraction must be at least 0 and below 1, not {fraction}.")
    below = threshold(fraction)
    if fraction == 0 or plan.num_samples * fraction > CERTAIN:
        return Holdout(below)
    refs = [
        (hash_of_key(ref.key), shard.index, ref.without_data())
        for shard in plan.shards
        for ref in list_samples(shard)
        if ref.problem is None
    ]
    refs.sort(key=lambda entry: (entry[0], entry[1], entry[2].index))
    for value, shard_index, ref in refs:
        try:
            decode_sample(load_sample(plan.shards[shard_index], ref), preprocessing)
        except BadImage:
            continue
        if refs[-1][0] >= max(below, value + 1):
            return Holdout(max(below, value + 1), forced=value >= below)
        break  # nothing would be left to train on
    raise CorpusError(
        f"{plan.corpus}: it takes two usable images with different keys, one to train on and one to hold out, but a hold-out of "
        f"{fraction:g} does not leave both ({plan.num_samples} samples in all). Add images, or hold out a smaller fraction; "
        f"what is wrong with samples says: vqmill inspect '{plan.corpus}'"
    )


def sample_name(shard: InputShard, ref: SampleRef) -> str:
    """What a sample is called where problems are listed: its key, for tars `SHARD[INDEX] KEY` since keys need not be unique there."""
    return f"{shard.name}[{ref.index}] {ref.key}" if shard.kind == "tar" else ref.key


def to_batch(images: Sequence[NDArray[np.uint8]], labels: Sequence[int]) -> dict[str, torch.Tensor]:
    """Stacks B images uint8 [C, S, S] and their labels, -1 for none."""
    return {"images": torch.from_numpy(np.stack(images)), "label": torch.tensor(labels, dtype=torch.int64)}
