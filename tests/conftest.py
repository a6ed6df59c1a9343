"""What all tests share: where the real data lies, and one Ray for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenizer
from pipelines.cluster import ray_cluster
from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.corpus.samples import read_samples
from pipelines.scenes import write_corpus
from pipelines.tokenize import TokenizeOptions, tokenize_corpus

DATA_ENVIRONMENT = "VQMILL_DATA"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora: $VQMILL_DATA, else `../shared/data` beside the project."""
    named = os.environ.get(DATA_ENVIRONMENT)
    folder = Path(named) if named else Path(__file__).parents[1] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            f"no real data: set ${DATA_ENVIRONMENT} to the folder that holds fashion-mnist/, imagenet-wds/, hostile/ ..."
        )
    return folder.resolve()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small generated corpus in three tar shards: 300 good images of 16x16 pixels in four classes, as a brace pattern."""
    folder = tmp_path_factory.mktemp("scenes")
    write_corpus(folder, num_images=300, num_shards=3, side=16)
    return str(folder / "scenes-{000000..000002}.tar")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, scenes: str) -> Path:
    """A tiny two-level tokenizer that has seen a few batches: its codes vary, which is all that is asked of it."""
    torch.manual_seed(0)
    model = tokenizer.from_preset(
        "rgb32",
        size=16,
        codebook_size=32,
        code_dim=8,
        hidden_dim=16,
        residual_dim=8,
        num_residual_blocks=1,
        start_step=1,
    )
    step = tokenizer.TokenizerStep(model)
    samples = [sample for shard in plan_corpus(scenes).shards for sample in read_samples(shard)][:64]
    preprocessing = Preprocessing(size=16, channels=3)
    images = torch.from_numpy(np.stack([decode_sample(sample, preprocessing).pixels for sample in samples]))
    for number in range(3):
        output = step.train()({"images": images})
        step.update(output.sums, output.pools, torch.Generator().manual_seed(number))
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(model.eval(), folder)
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray with two CPUs for all tests that need it in this process."""
    with ray_cluster(2):
        yield


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, scenes: str, tokenizer_folder: Path, ray_session: None) -> Path:
    """The codes of `scenes` as one quiet worker makes them: 300 rows in Zarr shards of 20."""
    out = tmp_path_factory.mktemp("reference") / "codes.zarr"
    options = TokenizeOptions(size=16, rows_per_shard=20)
    tokenize_corpus(plan_corpus(scenes), tokenizer.load(tokenizer_folder), out, options, lambda done, total, note: None)
    return out
