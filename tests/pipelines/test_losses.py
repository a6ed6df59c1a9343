"""What a job does when machines take spans with them: it encodes them again, while that leads anywhere."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tokenizer
from pipelines import tokenize as tokenize_module
from pipelines.assembly import Order
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.encoder import Encoding, Span, describe_device
from pipelines.errors import RunFailed, WriteLost
from pipelines.fleet import Fleet, Kinds
from pipelines.foreign import packed
from pipelines.spans import Encoders
from pipelines.watch import Watch
from vqmill.commits import Counts, Cursor
from vqmill.places import place_of
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA


class Committing:
    """As much of a StoreWriter as `_run` looks at."""

    def __init__(self) -> None:
        self.cursor = Cursor()

    def missing_shards(self) -> list[int]:
        return [self.cursor.input_shard]


@pytest.mark.parametrize(("commits", "tries"), [([0, 0, 0, 0], 3), ([0, 0, 1, 0, 0], 5), ([1, 1, 1, 1, 1, None], 6)])
def test_lost_spans_are_encoded_again_while_that_leads_anywhere(
    commits: list[int | None], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number is what a try commits before machines are lost; None for a try that ends well."""
    writer, missing = Committing(), []

    def attempt(plan: Any, model: Any, writer: Any, lost: list[int], *more: Any) -> None:
        missing.append(lost)
        if (new := commits[len(missing) - 1]) is None:
            return
        writer.cursor = Cursor(writer.cursor.input_shard + new)
        raise WriteLost("lost")

    monkeypatch.setattr(tokenize_module, "_try", attempt)
    job: Any = SimpleNamespace()
    if commits[-1] is None:
        tokenize_module._run(job, job, writer, [7], job, job, job, job)
    else:
        with pytest.raises(WriteLost):
            tokenize_module._run(job, job, writer, [7], job, job, job, job)
    assert len(missing) == tries
    assert missing[0] == [7]
    assert missing[1:] == [[sum(commits[: number + 1])] for number in range(tries - 1)]


@pytest.mark.usefixtures("ray_session")
def test_actors_end_when_nobody_wants_the_rest(scenes: str, tokenizer_folder: Path) -> None:
    """Otherwise those that take their place would wait for their CPU slots for ever."""
    import ray
    from ray.exceptions import RayActorError

    from pipelines.remote import EncoderActor

    model, started, plan = packed(tokenizer.load(tokenizer_folder)), [], plan_corpus(scenes)

    def start_actor() -> Any:
        started.append(EncoderActor.remote(model, Preprocessing(size=16, channels=3), Encoding(), "cpu", 2, 60))
        return started[-1]

    kinds = Kinds(describe_device("cpu"), lambda kind: None)
    encoders = Encoders(plan.shards, Fleet(start_actor, kinds), 2)
    watch = Watch(plan.shards, Counts(), 300, lambda seen: 0, lambda *shown: None, lambda facts: None)
    spans = encoders.between(Cursor(), Cursor(3), watch)
    assert next(spans).facts.rows == 100
    spans.close()
    encoders.close()
    assert len(started) == 2

    def ask_for_a_minute(actor: Any) -> None:
        for _ in range(600):  # an end takes a moment
            ray.get(actor.describe.remote(None))
            time.sleep(0.1)

    for actor in started:
        with pytest.raises(RayActorError):
            ask_for_a_minute(actor)


@pytest.mark.usefixtures("ray_session")
def test_a_write_tells_lost_spans_from_other_failures(tmp_path: Path, stores: Any) -> None:
    import ray

    from pipelines.remote import RayHands

    @ray.remote(num_cpus=0, max_restarts=0)
    class Dies:
        def span(self) -> None:
            os._exit(1)

    (tmp_path / "file").write_bytes(b"")
    empty = Span(0, {}, SAMPLES_SCHEMA.empty_table(), QUARANTINE_SCHEMA.empty_table())
    spec, hands = stores.two_levels, RayHands(place_of(tmp_path))
    lost = Order(place_of(tmp_path / "codes.zarr"), spec, 0, ((0, 0, True),))
    with pytest.raises(WriteLost, match="what was committed before is safe"):
        hands.collect(hands.submit(lost, [Dies.remote().span.remote()]))
    misplaced = Order(place_of(tmp_path / "file"), spec, 0, ((0, 0, True),))
    with pytest.raises(RunFailed, match="Not a directory") as failure:
        hands.collect(hands.submit(misplaced, [ray.put(empty)]))
    assert not isinstance(failure.value, WriteLost)
