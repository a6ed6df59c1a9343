"""Mends what can be mended in a store, so that the job that made it can finish it again.

Never guesses: what is left is what was committed and found whole. `plan_repair` decides and touches nothing; `repair_store` carries it out
in an order that leaves, after a kill at any moment, a store that verify and another repair understand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from vqmill import layout
from vqmill.errors import CodesError
from vqmill.places import Hold, Place, Where, place_of
from vqmill.problems import Problem, span
from vqmill.spec import StoreSpec
from vqmill.verify import job_of, lines_tried_again, resumable_commits, shard_of, verify_store


@dataclass(frozen=True)
class RepairPlan:
    """What a repair does, in this order.

    Attributes:
        spec: what the store will say of itself.
        rewrite: metadata files to write anew, by their path in the store; the group's is written first.
        tail: files of the lost tail, to remove.
        remove: other files to remove.
        remake: damaged files of commits that stay, to remove where they are there, and to be made again by the job.
        remaining: problems that no repair can mend.
    """

    spec: StoreSpec
    rewrite: tuple[str, ...]
    tail: tuple[str, ...]
    remove: tuple[str, ...]
    remake: tuple[str, ...]
    remaining: tuple[Problem, ...]


@dataclass(frozen=True)
class Repair:
    """What a repair did, or would do.

    Attributes:
        done: one sentence for each thing.
        remaining: problems that it could not mend.
        complete: whether the whole plan is still in.
        next: the command that finishes the store when it is not, or words for it.
    """

    done: tuple[str, ...]
    remaining: tuple[Problem, ...]
    complete: bool
    next: str


def plan_repair(spec: StoreSpec, problems: Iterable[Problem], names: Iterable[str]) -> RepairPlan:
    """From what is wrong to what is done about it.

    - Files that belong to nothing are removed. Metadata that is not what the group's sealed part says is written anew.
    - A lost tail is given up: the store goes back to the Zarr shards before it, one at least.
    - Damaged files of the Zarr shards that stay are removed; their commit records stay, so that what is made in their place can be compared.
    - Both only when the job that made the store can make again what is taken away; the store is then unfinished.
    - Segments stay: the job goes on with the plan of the last one, which begins with those before it.
    - Quarantine lines that a retry took up are not made again, for the samples may be good by now: no tail with some of them is given up.

    Args:
        spec: what the store says of itself.
        problems: all that `verify_store` found.
        names: every file of the store, by its path in it.
    """
    problems = tuple(problems)
    resumable = resumable_commits(spec, problems)
    kept = spec.num_commits if resumable is None else resumable
    remake: list[str] = []
    tail: set[str] = set()
    remove: set[str] = set()
    rewrite: set[str] = set()
    remaining: list[Problem] = []
    links = tuple(f"{problem.file}/" for problem in problems if problem.kind == "link")
    for problem in problems:
        if problem.kind in ("leftover", "pending"):
            remove.add(problem.file)
        elif problem.kind == "metadata" and not problem.file.startswith(links):
            rewrite.add(problem.file)
        elif problem.kind in ("unfinished", "reopened") or (problem.shards is not None and problem.shards[0] >= kept):
            continue  # the job sees to it, or it goes with the tail
        elif problem.kind == "damaged" and resumable is not None and not lines_tried_again(spec, problem):
            remake.append(problem.file)
        else:
            remaining.append(problem)
    after = spec
    if kept < spec.num_commits:
        after = spec.with_progress(num_rows=kept * spec.rows_per_shard, num_commits=kept, complete=False)
        rewrite |= {*layout.array_metadata(after), "zarr.json"}
        tail = {name for name in names if (shard := shard_of(spec, name)) is not None and shard >= kept}
    elif remake and spec.complete:
        after = replace(spec, complete=False)
        rewrite.add("zarr.json")
    return RepairPlan(
        spec=after,
        rewrite=tuple(sorted(rewrite)),
        tail=tuple(sorted(tail - remove)),
        remove=tuple(sorted(remove)),
        remake=tuple(sorted(remake)),
        remaining=tuple(remaining),
    )


def repair_store(
    path: Where,
    progress: Callable[[int, int], None] | None = None,
    *,
    dry_run: bool = False,
    again: str | None = None,
) -> Repair:
    """Verifies a store and mends what can be mended. Killed at any moment, it can be run again.

    Args:
        path: the store's folder or address.
        progress: of the verification, called with (Zarr shards done, Zarr shards in all).
        dry_run: say what would be done, and do nothing.
        again: the command that made the store, when it is known: part of the advice.

    Raises:
        UsageError: no store there, or a job is writing it.
        CodesError: the group's own metadata is damaged: nothing else says what the store is.
    """
    place = place_of(path)
    layout.read_spec(place)
    hold = place.hold("A job is writing this store; it mends what a killed job left. Wait for it to end.", layout.GROUP)
    try:
        spec = layout.read_spec(place)
        problems = verify_store(place, progress, again=again).problems
        plan = plan_repair(spec, problems, place.list())
        for name in (*plan.rewrite, *plan.tail, *plan.remove, *plan.remake):
            if place.is_blocked(name):
                raise CodesError(
                    f"{place.name}/{name}: a folder where a file belongs, or a file where its folder belongs. Take it away by hand."
                )
        if not dry_run:
            _carry_out(place, hold, plan)
            _require_mended(place, plan)
    finally:
        hold.close()
    return Repair(tuple(_said(spec, plan)), plan.remaining, plan.spec.complete, job_of(spec, again))


def _carry_out(place: Place, hold: Hold, plan: RepairPlan) -> None:
    """Damaged files first, then the group, then the rest.

    A job that goes on after a kill, before the repair is run again, so knows what to make anew; and once the group is written, readers
    refuse the store, or see only rows that stay.
    """
    arrays = layout.array_metadata(plan.spec)
    hold.check()
    place.delete(plan.remake)
    if layout.GROUP in plan.rewrite:
        hold.publish(layout.group_metadata(plan.spec))
    for name in plan.rewrite:
        if name != layout.GROUP:
            place.write(name, arrays[name])
    place.delete((*plan.tail, *plan.remove))


def _require_mended(place: Place, plan: RepairPlan) -> None:
    """Looks again, at metadata and sizes: what is left must be what was said to be left, and what was taken away to be made again."""
    expected = {problem.file for problem in plan.remaining} | set(plan.remake)
    for problem in verify_store(place, quick=True).damage:
        if problem.file not in expected:
            raise CodesError(f"{place.name}: repaired, and yet: {problem}")


def _said(before: StoreSpec, plan: RepairPlan) -> Iterable[str]:
    after = plan.spec
    if after.num_commits < before.num_commits:
        lost = span("Zarr shard", (after.num_commits, before.num_commits - 1))
        rows = before.num_rows - after.num_rows
        yield f"back to {after.num_commits:,} Zarr shards: {lost} ({rows:,} rows, {len(plan.tail):,} files) given up"
    if before.complete and not after.complete:
        yield "marked as unfinished"
    yield from (f"{name}: written anew" for name in plan.rewrite)
    yield from (f"{name}: removed" for name in plan.remove)
    yield from (f"{name}: removed, to be made again" for name in plan.remake)
