"""Mends what can be mended in a store, so that the job that made it can finish it again.

Never guesses: what is left is what was committed and found whole. `plan_repair` decides and touches nothing; `repair_store` carries it out
in an order that a kill at any moment leaves a store that says less than it holds, never more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vqmill import layout
from vqmill.errors import CodesError
from vqmill.files import hold_lock, sync_folder, write_whole
from vqmill.problems import Problem, span, whole_commits
from vqmill.spec import StoreSpec
from vqmill.verify import made_by_tokenizing, shard_of, verify_store


@dataclass(frozen=True)
class RepairPlan:
    """What a repair does, in this order.

    Attributes:
        spec: what the store will say of itself.
        group: whether the group's metadata is written anew.
        arrays: metadata files of arrays to write anew, by their path in the store.
        remove: files to remove, by their path in the store.
        remaining: problems that no repair can mend.
    """

    spec: StoreSpec
    group: bool
    arrays: tuple[str, ...]
    remove: tuple[str, ...]
    remaining: tuple[Problem, ...]


@dataclass(frozen=True)
class Repair:
    """What a repair did, or would do.

    Attributes:
        done: one sentence for each thing.
        remaining: problems that it could not mend.
        complete: whether the whole plan is still in; otherwise the job that made the store is to be run again.
    """

    done: tuple[str, ...]
    remaining: tuple[Problem, ...]
    complete: bool


def plan_repair(spec: StoreSpec, problems: Iterable[Problem], names: Iterable[str]) -> RepairPlan:
    """From what is wrong to what is done about it.

    - Files that belong to nothing are removed. Metadata that is not what the group's sealed part says is written anew.
    - A lost tail is given up: the store goes back to the Zarr shards before it, one at least.
    - Damaged files of the Zarr shards that stay are removed; their commit records stay, so that what is made in their place can be compared.
    - Both are done only when `tokenize` can make them again; then the store is unfinished.

    Args:
        spec: what the store says of itself.
        problems: all that `verify_store` found.
        names: every file of the store, by its path in it.
    """
    problems = tuple(problems)
    tokenized = made_by_tokenizing(spec)
    kept = whole_commits(spec.num_commits, problems) if tokenized else spec.num_commits
    kept = kept or spec.num_commits  # with no whole commit there is nothing to go back to
    after = spec
    if kept < spec.num_commits:
        after = after.with_progress(num_rows=kept * spec.rows_per_shard, num_commits=kept, complete=False)
    remove: set[str] = set()
    rewrite: set[str] = set(layout.array_metadata(spec)) if after != spec else set()
    remaining: list[Problem] = []
    for problem in problems:
        lost = problem.shards is not None and problem.shards[0] >= kept
        match problem.kind:
            case "leftover" | "pending":
                remove.add(problem.file)
            case "metadata":
                rewrite.add(problem.file)
            case "damaged" if tokenized and not lost:
                remove.add(problem.file)
                after = after.with_progress(num_rows=after.num_rows, num_commits=kept, complete=False)
            case "unfinished":
                pass
            case _ if not lost:
                remaining.append(problem)
            case _:
                pass  # goes with the tail
    names = set(names)
    if kept < spec.num_commits:
        remove |= {name for name in names if (shard := shard_of(spec, name)) is not None and shard >= kept}
    return RepairPlan(
        spec=after,
        group=after != spec or "zarr.json" in rewrite,
        arrays=tuple(sorted(rewrite - {"zarr.json"})),
        remove=tuple(sorted(remove & names)),
        remaining=tuple(remaining),
    )


def repair_store(
    path: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    dry_run: bool = False,
    again: str | None = None,
) -> Repair:
    """Verifies a store and mends what can be mended. Killed at any moment, it can be run again.

    Args:
        path: the store's folder.
        progress: of the verification, called with (Zarr shards done, Zarr shards in all).
        dry_run: say what would be done, and do nothing.
        again: the command that made the store, when it is known: part of the advice.

    Raises:
        UsageError: no store there, or a job is writing it.
        CodesError: the group's own metadata is damaged: nothing else says what the store is.
    """
    spec = layout.read_spec(path)
    lock = hold_lock(path, "A job is writing this store; it mends what a killed job left. Wait for it to end.")
    try:
        spec = layout.read_spec(path)
        problems = verify_store(path, progress, again=again).problems
        plan = plan_repair(spec, problems, _names(path))
        if not dry_run:
            _carry_out(path, plan)
            _require_mended(path, plan)
    finally:
        os.close(lock)
    return Repair(tuple(_said(spec, plan)), plan.remaining, plan.spec.complete)


def _names(path: Path) -> list[str]:
    from vqmill.writer import files_of

    return [file.relative_to(path).as_posix() for file in files_of(path)]


def _carry_out(path: Path, plan: RepairPlan) -> None:
    """The group first: from then on readers refuse the store, or see only rows that stay."""
    if plan.group:
        write_whole(path / "zarr.json", layout.group_metadata(plan.spec))
    metadata = layout.array_metadata(plan.spec)
    for name in plan.arrays:
        write_whole(path / name, metadata[name])
    for name in plan.remove:
        (path / name).unlink(missing_ok=True)
    for folder in sorted({(path / name).parent for name in plan.remove}):
        sync_folder(folder)


def _require_mended(path: Path, plan: RepairPlan) -> None:
    """Looks again, at metadata and sizes: what is left must be what was said to be left, and what was taken away to be made again."""
    expected = {problem.file for problem in plan.remaining} | set(plan.remove)
    for problem in verify_store(path, quick=True).damage:
        if problem.file not in expected:
            raise CodesError(f"{path}: repaired, and yet: {problem}")


def _said(before: StoreSpec, plan: RepairPlan) -> Iterable[str]:
    after = plan.spec
    if after.num_commits < before.num_commits:
        lost = span("Zarr shard", (after.num_commits, before.num_commits - 1))
        rows = span("row", (after.num_rows, before.num_rows - 1))
        yield f"back to {after.num_commits:,} Zarr shards with {after.num_rows:,} rows; {lost} ({rows}) given up"
    if before.complete and not after.complete:
        yield "marked as unfinished"
    if plan.group and after == before:
        yield "zarr.json written anew"
    for name in plan.arrays:
        yield f"{name} written anew"
    for name in plan.remove:
        yield f"{name} removed"
