"""The hold-out: what it leaves out is said, and its errors give advice that works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.corpus import CorpusError, Preprocessing, Problem, Reason, list_samples, plan_corpus
from pipelines.corpus.holdout import choose_holdout, hash_of_key, sample_name
from pipelines.corpus.stream import Augmentation, TrainingStream
from pipelines.corpus.walk import holdout_batches

SMALL = Preprocessing(8)


def test_held_out_samples_that_do_not_decode_are_reported(folder: Path) -> None:
    keys = sorted(
        (ref.key for shard in plan_corpus(str(folder)).shards for ref in list_samples(shard)), key=hash_of_key
    )
    (folder / f"{keys[0]}.png").write_bytes(b"")
    cut = folder / f"{keys[1]}.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (folder / f"{keys[-1]}.png").write_bytes(b"")  # never held out
    plan = plan_corpus(str(folder))
    fraction = (hash_of_key(keys[5]) + hash_of_key(keys[6])) / 2**65  # six are held out
    problems: dict[str, Problem] = {}
    batches = list(holdout_batches(plan, SMALL, fraction, batch_size=4, problems=problems))
    assert {name: problem.reason for name, problem in problems.items()} == {
        keys[0]: Reason.EMPTY,
        keys[1]: Reason.TRUNCATED,
    }
    alone = list(holdout_batches(plan, SMALL, fraction, batch_size=4))
    assert [len(batch["label"]) for batch in batches] == [len(batch["label"]) for batch in alone]


def test_names_of_tar_samples_are_those_of_the_stream(tmp_path: Path, make_picture: Callable[..., bytes]) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(30):
            writer.write({"__key__": f"{number}", "png": make_picture(number) if number % 2 else b"no"})
    plan = plan_corpus(str(tmp_path))
    problems: dict[str, Problem] = {}
    assert list(holdout_batches(plan, SMALL, 0.6, batch_size=4, problems=problems))
    stream = TrainingStream(plan, SMALL, Augmentation(), batch_size=30, seed=0)
    next(stream)
    next(stream)
    stream.close()
    assert problems
    assert problems.items() <= stream.quarantined.items()
    shard = plan.shards[0]
    assert problems.keys() <= {sample_name(shard, ref) for ref in list_samples(shard)}


def test_the_advice_of_the_error_helps(folder: Path) -> None:
    for path in [*folder.rglob("*.png")][3:]:
        path.unlink()
    plan = plan_corpus(str(folder))
    with pytest.raises(CorpusError, match="hold out a smaller fraction") as caught:
        choose_holdout(plan, SMALL, 1 - 1e-9)
    assert "fraction 0" not in str(caught.value)
    assert choose_holdout(plan, SMALL, 0.01)
