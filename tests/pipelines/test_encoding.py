"""How codes are computed: compiled networks, copies of codes, and what a store records of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import tokenizer
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.encoder import Encoding, SpanEncoder
from pipelines.foreign import packed
from pipelines.tokenize import TokenizeOptions, store_spec
from pipelines.tokenize_command import tokenize
from vqmill.errors import UsageError
from vqmill.settings import different_settings


def codes_of(corpus: str, folder: Path, encoding: Encoding) -> dict[str, np.ndarray[Any, Any]]:
    """Codes of the first input shard."""
    model = tokenizer.load(folder)
    made = SpanEncoder(packed(model), Preprocessing(size=16, channels=model.channels), encoding, "cpu")
    (span,) = made.spans(plan_corpus(corpus).shards[0])
    return span.codes


@pytest.fixture
def small_tokenizer(tmp_path: Path) -> Path:
    """One level and few layers, as compiling takes its time; a few steps bring its codebook to where the features are."""
    torch.manual_seed(0)
    model = tokenizer.from_preset(
        "grey28", size=16, codebook_size=16, code_dim=4, hidden_dim=8, num_residual_blocks=0, start_step=1
    )
    step = tokenizer.TokenizerStep(model)
    images = torch.randint(0, 256, (32, 1, 4, 4), dtype=torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    for number in range(3):
        output = step.train()({"images": images})
        step.update(output.sums, output.pools, torch.Generator().manual_seed(number))
    tokenizer.save(model.eval(), tmp_path)
    return tmp_path


@pytest.fixture
def all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_networks_give_the_codes_but_for_rounding(scenes: str, small_tokenizer: Path) -> None:
    plain = codes_of(scenes, small_tokenizer, Encoding())
    torch.compiler.reset()
    counters.clear()
    compiled = codes_of(scenes, small_tokenizer, Encoding(compiled=True))
    assert counters["inductor"], "nothing was compiled"
    torch.compiler.reset()
    for level, codes in plain.items():
        assert codes.shape == compiled[level].shape
        assert (codes == compiled[level]).mean() > 0.99
    assert len(np.unique(compiled["codes"])) > 4


def test_a_store_records_that_networks_were_compiled_and_only_then(scenes: str, tokenizer_folder: Path) -> None:
    plan, model, options = plan_corpus(scenes), tokenizer.load(tokenizer_folder), TokenizeOptions(size=16)
    plain = store_spec(plan, model, options)
    compiled = store_spec(plan, model, replace(options, encoding=Encoding(compiled=True)))
    assert "compiled" not in plain.tokenizer
    assert compiled.tokenizer["compiled"] is True
    assert different_settings(plain.settings(), compiled.settings()) == ["tokenizer.compiled: there null, now true"]


def test_other_peoples_code_compiles_itself(scenes: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--compile: your own code does that itself"):
        tokenize(
            scenes, None, tmp_path / "codes.zarr", module="anything:make", size=16, workers=1, batch_size=32, shard_rows=None, codec="auto",
            precision="fp32", device="cpu", dry_run=True, compiled=True,
        )  # fmt: skip


@pytest.mark.usefixtures("all_threads")
def test_a_tokenizer_may_use_the_memory_of_its_codes_again(
    scenes: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = Encoding(batch_size=32)
    expected = codes_of(scenes, tokenizer_folder, batches)
    encode, kept = tokenizer.Tokenizer.encode, dict[str, torch.Tensor]()

    def thrifty(self: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        for level, codes in encode(self, images).items():
            kept.setdefault(level, torch.empty(64, *codes.shape[1:], dtype=torch.int64))[: len(codes)] = codes
        return {level: codes[: len(images)] for level, codes in kept.items()}

    monkeypatch.setattr(tokenizer.Tokenizer, "encode", thrifty)
    found = codes_of(scenes, tokenizer_folder, batches)
    assert all(np.array_equal(expected[level], found[level]) for level in expected)
