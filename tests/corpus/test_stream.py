"""The training stream: one order for all threads, ranks and resumptions; nothing held out is ever trained on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.corpus import (
    Augmentation,
    CorpusError,
    Plan,
    Preprocessing,
    Reason,
    decode_image,
    list_samples,
    plan_corpus,
    read_samples,
)
from pipelines.corpus.holdout import choose_holdout, hash_of_key, in_holdout
from pipelines.corpus.stream import TrainingStream
from pipelines.corpus.walk import holdout_batches
from vqmill.errors import CodesError

SMALL = Preprocessing(8)
PLAIN = Augmentation("center", flip=False)


def make_stream(plan: Plan, **options: Any) -> TrainingStream:
    return TrainingStream(
        plan, **{"preprocessing": SMALL, "augmentation": Augmentation(), "batch_size": 4, "seed": 1, **options}
    )


def take(stream: TrainingStream, count: int) -> list[dict[str, torch.Tensor]]:
    batches = list(islice(stream, count))
    stream.close()
    return batches


def equal(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in ("images", "label")
    )


@pytest.fixture
def plan(shards: Path) -> Plan:
    return plan_corpus(str(shards))


@pytest.mark.parametrize("shuffle_buffer", [1, 7, 30, 1000])
def test_an_epoch_is_every_sample_once(plan: Plan, shuffle_buffer: int) -> None:
    batches = take(make_stream(plan, batch_size=5, shuffle_buffer=shuffle_buffer, augmentation=PLAIN), 12)
    assert batches[0]["images"].shape == (5, 3, 8, 8)
    assert batches[0]["images"].dtype == torch.uint8
    assert batches[0]["label"].dtype == torch.int64
    expected = Counter(
        decode_image(s.image, SMALL).pixels.tobytes() for shard in plan.shards for s in read_samples(shard)
    )
    orders = []
    for epoch in (batches[:6], batches[6:]):
        images = [image.numpy().tobytes() for batch in epoch for image in batch["images"]]
        assert Counter(images) == expected
        orders.append(images)
    assert orders[0] != orders[1]


def test_threads_change_nothing_and_seeds_do(plan: Plan) -> None:
    one = take(make_stream(plan, num_threads=1), 20)
    assert equal(one, take(make_stream(plan, num_threads=7), 20))
    assert not equal(one, take(make_stream(plan, seed=2), 20))
    assert not equal(one, take(make_stream(plan, augmentation=PLAIN), 20))
    assert not equal(one, take(make_stream(plan, shuffle_buffer=9), 20))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_divide_one_order(plan: Plan, world_size: int) -> None:
    whole = take(make_stream(plan, batch_size=4 * world_size), 12)
    parts = [take(make_stream(plan, rank=rank, world_size=world_size), 12) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        together = torch.stack([part[step]["images"] for part in parts], 1).flatten(0, 1)
        assert torch.equal(together, batch["images"])


@pytest.mark.parametrize("done", [0, 1, 7, 8, 20])
def test_resumes_exactly(plan: Plan, done: int) -> None:
    options = {"shuffle_buffer": 11, "holdout_fraction": 0.2}
    whole = take(make_stream(plan, **options), 30)
    first = make_stream(plan, **options)
    assert equal(list(islice(first, done)), whole[:done])
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert len(json.dumps(state)) < 300
    second = make_stream(plan, num_threads=3, **options)
    second.load_state_dict(state)
    assert equal(take(second, 30 - done), whole[done:])
    assert equal(take(first, 5), whole[done : done + 5]), "a closed stream goes on"


def test_one_state_serves_every_rank_and_world_size(plan: Plan) -> None:
    whole = take(make_stream(plan, batch_size=6), 20)
    state = {}
    for rank in range(2):
        stream = make_stream(plan, batch_size=3, rank=rank, world_size=2)
        take(stream, 9)
        assert state in ({}, stream.state_dict())
        state = stream.state_dict()
    alone = make_stream(plan, batch_size=6)
    alone.load_state_dict(state)
    assert equal(take(alone, 11), whole[9:])


def test_a_state_of_another_stream_is_refused(plan: Plan, shards: Path) -> None:
    state = make_stream(plan).state_dict()
    other = plan_corpus(str(shards / "000000.tar"))
    for stream in (
        make_stream(plan, seed=2),
        make_stream(plan, holdout_fraction=0.1),
        make_stream(plan, shuffle_buffer=3),
        make_stream(other),
    ):
        with pytest.raises(CodesError, match="cannot resume"):
            stream.load_state_dict(state)


def test_bad_samples_are_left_out_and_kept_in_mind(folder: Path) -> None:
    (folder / "cat/00.png").write_bytes(b"")
    (folder / "dog/01.png").write_bytes((folder / "dog/03.png").read_bytes()[:300])
    stream = make_stream(plan_corpus(str(folder)), batch_size=11)
    batches = take(stream, 4)
    assert {key: problem.reason for key, problem in stream.quarantined.items()} == {
        "cat/00": Reason.EMPTY,
        "dog/01": Reason.TRUNCATED,
    }
    assert sorted(torch.cat([batch["label"] for batch in batches[:2]]).tolist()) == [0] * 11 + [1] * 11


def test_problems_of_tars_are_kept_in_mind(tmp_path: Path, make_picture: Callable[..., bytes]) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "a", "cls": b"1"})
        for key in "bcb":
            writer.write({"__key__": key, "png": make_picture(3)})
    stream = make_stream(plan_corpus(str(tmp_path)), batch_size=2)
    batch = next(stream)
    stream.close()
    assert batch["label"].tolist() == [-1, -1]
    assert {key: problem.reason for key, problem in stream.quarantined.items()} == {
        "a.tar[0] a": Reason.MISSING_IMAGE, "a.tar[3] b": Reason.DUPLICATE_KEY,
    }  # fmt: skip


def test_a_corpus_without_a_usable_image_ends_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(CorpusError, match="no image of it can be decoded"):
        next(make_stream(plan_corpus(str(tmp_path))))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.tar").write_bytes(b"no")
    with pytest.raises(CorpusError, match="nothing to train on"):
        next(make_stream(plan_corpus(str(tmp_path / "b"))))


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"seed": -1},
        {"rank": 1},
        {"rank": -1},
        {"world_size": 0},
        {"num_threads": 0},
        {"shuffle_buffer": 0},
        {"holdout_fraction": 1.0},
    ],
)
def test_options_are_checked(plan: Plan, options: dict[str, Any]) -> None:
    with pytest.raises(CodesError):
        make_stream(plan, **options)


def test_the_hash_is_for_ever() -> None:
    assert hash_of_key("train-00000000") == 0x629693426DBB2627
    held = sum(in_holdout(f"key {n}", 0.1) for n in range(10_000))
    assert 900 < held < 1100
    assert not in_holdout("anything", 0)


def test_training_never_sees_the_hold_out(plan: Plan) -> None:
    options = {"augmentation": PLAIN, "holdout_fraction": 0.3, "batch_size": 1}
    batches = list(holdout_batches(plan, SMALL, 0.3, batch_size=4))
    held = {image.numpy().tobytes() for batch in batches for image in batch["images"]}
    keys = [ref.key for shard in plan.shards for ref in list_samples(shard)]
    assert len(held) == sum(in_holdout(key, 0.3) for key in keys) > 0
    seen = {batch["images"][0].numpy().tobytes() for batch in take(make_stream(plan, **options), 60)}
    assert len(seen) == 30 - len(held)
    assert not seen & held
    limited = list(holdout_batches(plan, SMALL, 0.3, batch_size=4, limit=3))
    assert [len(batch["label"]) for batch in limited] == [3]
    assert torch.equal(limited[0]["images"], batches[0]["images"][:3])


def test_a_tiny_corpus_holds_out_its_smallest_hash(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_corpus(str(folder))
    keys = sorted((ref.key for shard in plan.shards for ref in list_samples(shard)), key=hash_of_key)
    holdout = choose_holdout(plan, SMALL, 1e-6)
    assert holdout.forced
    assert [key for key in keys if key in holdout] == keys[:1]
    assert sum(len(batch["label"]) for batch in holdout_batches(plan, SMALL, 1e-6, 8)) == 1
    assert "caught no usable sample" in caplog.text
    (folder / f"{keys[0]}.png").write_bytes(b"no")  # nothing to validate with: the next one is taken
    plan = plan_corpus(str(folder))
    assert [key for key in keys if key in choose_holdout(plan, SMALL, 1e-6)] == keys[:2]
    assert not choose_holdout(plan, SMALL, 0).below


def test_one_image_cannot_be_divided(tmp_path: Path, make_picture: Callable[..., bytes]) -> None:
    (tmp_path / "a.png").write_bytes(make_picture(0))
    plan = plan_corpus(str(tmp_path))
    with pytest.raises(CorpusError, match="two usable images"):
        make_stream(plan, holdout_fraction=0.05)
    with pytest.raises(CodesError, match="fraction of 0"):
        next(holdout_batches(plan, SMALL, 0, 4))
    assert next(make_stream(plan))["images"].shape == (4, 3, 8, 8)
