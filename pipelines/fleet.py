"""Encoder actors on machines that come and go: started, looked at before they get work, and started again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import RunFailed

MAX_FAILED_STARTS = 3  # without one that worked in between
SEPARATOR = "; "  # as in stores that `vqmill merge` joined


@dataclass(frozen=True)
class Machine:
    """What an actor says of where it runs.

    Attributes:
        host: its name.
        kind: as `encoder.describe_device` names it.
        sees_corpus: whether it finds the path that it was asked for.
        node: Ray's identifier of it; empty when it is not known.
    """

    host: str
    kind: str
    sees_corpus: bool
    node: str = ""


class Kinds:
    """The kinds of machine whose codes a store holds: one, unless several are allowed."""

    def __init__(self, recorded: str, record: Callable[[str], None], *, mixed: bool = False) -> None:
        """Takes note.

        Args:
            recorded: what the store says; nothing when no machine has been seen yet.
            record: called with what it must say from now on, before rows of another kind count.
            mixed: whether several kinds are allowed.
        """
        self._kinds = set(recorded.split(SEPARATOR)) if recorded else set[str]()
        self._record, self._mixed = record, mixed

    def admit(self, machine: Machine) -> None:
        """Takes a machine in.

        Raises:
            RunFailed: it is of another kind.
        """
        if machine.kind in self._kinds:
            return
        if self._kinds and not self._mixed:
            raise RunFailed(
                f"the machines differ ({SEPARATOR.join(sorted({*self._kinds, machine.kind}))}; the last one that came is {machine.host}), and so might "
                "their codes. Run on machines of one kind, or allow it with --allow-mixed, which is recorded in the store."
            )
        self._kinds.add(machine.kind)
        self._record(SEPARATOR.join(sorted(self._kinds)))


class Fleet:
    """Actors from their start to their first work.

    Attributes:
        starting: those of which nothing has been heard, by what they are asked.
    """

    def __init__(self, start_actor: Callable[[], Any], kinds: Kinds, corpus: Path | None = None) -> None:
        """Takes note; starts nothing.

        Args:
            start_actor: gives a new `remote.EncoderActor`.
            kinds: who may work.
            corpus: a file or folder of the corpus that every machine must see; None when it lies in a bucket.
        """
        self._start_actor, self._kinds, self._corpus = start_actor, kinds, corpus
        self._failed = 0
        self._nodes: dict[Any, str] = {}
        self.starting: dict[Any, Any] = {}

    def start(self, number: int = 1) -> None:
        """Starts actors; where a cluster has no room for them, they wait."""
        for _ in range(number):
            actor = self._start_actor()
            self.starting[actor.describe.remote(self._corpus)] = actor

    def welcome(self, answer: Any) -> list[Any]:
        """Takes up an answer of `starting`: its actor, or none when that was lost and another one was started.

        Raises:
            RunFailed: actors do not start, or the machine is none that can work.
        """
        import ray
        from ray.exceptions import RayActorError, RayError

        actor = self.starting.pop(answer)
        try:
            machine: Machine = ray.get(answer)
        except RayError as error:
            self._failed += 1
            if self._failed == MAX_FAILED_STARTS or not isinstance(error, RayActorError) or error.actor_init_failed:
                raise RunFailed(f"an encoder worker did not start: {_why(error)}") from error
            self.start()  # its process or its machine was lost
            return []
        self._failed = 0
        self._kinds.admit(machine)
        if self._corpus and not machine.sees_corpus and self._corpus.exists():
            raise RunFailed(
                f"{machine.host}: {self._corpus} is not there, but on this machine it is. A local corpus must be at the same place on every machine of "
                "the cluster (a shared folder). Or read it from a bucket: docs/object-stores.md."
            )
        self._nodes[actor] = machine.node
        return [actor]

    def dismiss(self, actor: Any) -> bool:
        """Ends an actor that does not answer, dead or not, so that its place is free; says whether its machine was lost with it."""
        import ray

        ray.kill(actor)
        node = self._nodes.pop(actor)
        return bool(node) and not any(found["Alive"] and found["NodeID"] == node for found in ray.nodes())


def _why(error: Exception) -> str:
    """The last line of an error, and what to do when a worker lacks our code or its needs."""
    last = str(error).strip().splitlines()[-1]
    if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
        return (
            f"{last}. Every machine of the cluster needs vqmill and what it imports, in the versions of this one: install them there, or "
            "send them along with: ray job submit --runtime-env-json ..."
        )
    return last
