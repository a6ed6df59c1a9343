"""Encoder actors and the machines they start on: who may work, who is started again, and what the store says of it."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tokenizer
import vqmill
from pipelines.corpus.plan import plan_corpus
from pipelines.encoder import describe_device
from pipelines.errors import RunFailed
from pipelines.fleet import Fleet, Kinds, Machine
from pipelines.options import ClusterFlags
from pipelines.spans import STUCK, _Range, _Running
from pipelines.tokenize import TokenizeOptions, TokenizeResult, tokenize_corpus
from pipelines.watch import Watch
from vqmill.commits import Counts, Cursor
from vqmill.errors import UsageError
from vqmill.layout import group_metadata


def tree(store: Path) -> dict[str, bytes]:
    return {
        path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
    }


@pytest.mark.usefixtures("ray_session")
def test_machines_that_cannot_work_are_refused_before_they_do(tmp_path: Path) -> None:
    import ray

    from pipelines.remote import EncoderActor

    assert EncoderActor is not None
    (corpus := tmp_path / "photos.tar").touch()
    recorded: list[str] = []

    def welcome(machine: Machine, *, mixed: bool, there: Path = corpus) -> list[Any]:
        fleet = Fleet(lambda: None, Kinds("cpu A", recorded.append, mixed=mixed), there)
        answer = ray.put(machine)
        fleet.starting[answer] = "the actor"
        return fleet.welcome(answer)

    assert welcome(Machine("node-1", "cpu A", True), mixed=False) == ["the actor"]
    assert not recorded
    with pytest.raises(
        RunFailed, match=r"the machines differ \(cpu A; cpu B; the last one that came is node-2\).*--allow-mixed"
    ):
        welcome(Machine("node-2", "cpu B", True), mixed=False)
    assert not recorded
    assert welcome(Machine("node-2", "cpu 0", True), mixed=True) == ["the actor"]
    assert recorded == ["cpu 0; cpu A"]
    with pytest.raises(RunFailed, match=r"node-3: .*photos.tar is not there, .* same place on every machine"):
        welcome(Machine("node-3", "cpu A", False), mixed=False)
    assert welcome(Machine("node-3", "cpu A", False), mixed=False, there=tmp_path / "removed.tar") == ["the actor"]


@pytest.mark.usefixtures("ray_session")
def test_a_machine_without_our_code_is_told_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    (tmp_path / "only_here_4711.py").write_text("class Actor:\n    def describe(self, corpus):\n        return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # the workers of a Ray that runs do not see it
    import only_here_4711  # pyright: ignore[reportMissingImports]

    fleet = Fleet(ray.remote(only_here_4711.Actor).options(num_cpus=0).remote, Kinds("", print))
    fleet.start()
    with pytest.raises(RunFailed, match=r"(?s)did not start: .*Every machine of the cluster needs vqmill"):
        fleet.welcome(next(iter(fleet.starting)))


@pytest.mark.usefixtures("ray_session")
def test_an_actor_that_is_lost_while_it_starts_is_started_again_but_not_for_ever() -> None:
    import ray

    @ray.remote(max_restarts=0)
    class Dies:
        def describe(self, corpus: Path | None) -> None:
            os._exit(9)

    fleet = Fleet(Dies.options(num_cpus=0).remote, Kinds("", print))
    fleet.start()
    for _ in range(2):
        assert fleet.welcome(next(iter(fleet.starting))) == []
    with pytest.raises(RunFailed, match="an encoder worker did not start"):
        fleet.welcome(next(iter(fleet.starting)))


@pytest.mark.usefixtures("ray_session")
def test_a_stopped_job_goes_on_on_another_kind_of_machine_when_that_is_allowed(
    reference: Path, scenes: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    options = TokenizeOptions(size=16, rows_per_shard=20)
    mixed = replace(options, cluster=ClusterFlags(allow_mixed=True))
    plan, out = plan_corpus(scenes), tmp_path / "codes.zarr"

    def make(options: TokenizeOptions) -> TokenizeResult:
        model = tokenizer.load(tokenizer_folder)
        return tokenize_corpus(plan, model, out, options, lambda done, total, note: None)

    shutil.copytree(reference, out)
    spec = vqmill.open_codes(out).spec
    other = {**spec.tokenizer, "computed_on": "another machine"}
    (out / "zarr.json").write_bytes(group_metadata(replace(spec, tokenizer=other, complete=False)))
    (out / "bottom/c/3/0/0").unlink()
    with pytest.raises(UsageError, match=r"(?s)tokenizer.computed_on: there .another machine.*--allow-mixed"):
        make(options)
    assert make(mixed).mended == (3,)
    kinds = f"another machine; {describe_device('cpu')}"
    assert vqmill.open_codes(out).spec.tokenizer["computed_on"] == kinds
    differing = [name for name, data in tree(out).items() if tree(reference)[name] != data]
    assert differing == ["zarr.json"]
    with pytest.raises(UsageError, match=r"(?s)there .*another machine.*--allow-mixed"):
        make(options)  # nor does it go back: what is recorded stays
    assert not make(mixed).did_something


class Places:
    """A fleet that remembers what it is told."""

    def __init__(self, lost: bool) -> None:
        self.lost, self.dismissed, self.started = lost, [], 0
        self.starting: dict[Any, Any] = {}

    def dismiss(self, actor: str) -> bool:
        self.dismissed.append(actor)
        return self.lost

    def start(self) -> None:
        self.started += 1


def stretch(scenes: str, *, lost: bool) -> tuple[_Range, Places]:
    """Two actors at work on the second and third of three input shards; the first one has none."""
    shards, fleet = plan_corpus(scenes).shards, Places(lost)
    watch = Watch(shards, Counts(), 300, lambda seen: 0, lambda *shown: None, lambda line: None)
    watch.hired(2)
    place: Any = fleet
    made = _Range(shards, [], {"a": 0, "b": 1}, place, 8, Cursor(), 3, {}, watch)
    for unit, actor in ((1, "a"), (2, "b")):
        made.running[f"stream {unit}"] = _Running(unit, actor, 5, 9)
        watch.began(made.numbers[actor], unit, 0)
    return made, fleet


def test_work_that_all_wait_for_gets_the_place_of_the_last_in_order(scenes: str) -> None:
    made, fleet = stretch(scenes, lost=False)
    made.again, made.stuck = [(0, 2)], STUCK - 1
    made._explain([])
    assert not fleet.dismissed, "it may only have to wait a moment"
    made.stuck += 1
    made._explain([])
    assert (fleet.dismissed, fleet.started, made.again, made.numbers) == (["b"], 1, [(0, 2), (2, 5)], {"a": 0})
    assert list(made.running) == ["stream 1"]
    made._explain([])
    assert fleet.dismissed == ["b"], "one at a time"


@pytest.mark.parametrize("lost", [True, False], ids=["machine", "actor"])
def test_a_lost_machine_is_not_blamed_on_samples(scenes: str, lost: bool) -> None:
    made, fleet = stretch(scenes, lost=lost)
    for _ in range(2):
        made._bury(made.running["stream 1"], RuntimeError("died"))
    assert fleet.dismissed == ["a", "a"], "it may be alive and hold its place"
    assert made.deaths[1, 5] == (0 if lost else 2)
    if lost:
        made._bury(made.running["stream 1"], RuntimeError("died"))
        assert made.again == [(1, 5)] * 3
    else:
        with pytest.raises(RunFailed, match="killed its worker 3 times"):
            made._bury(made.running["stream 1"], RuntimeError("died"))
