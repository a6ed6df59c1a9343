"""Reads every byte of a store and says what is wrong with it, and where. Goes on after every problem."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vqmill import layout
from vqmill.commits import Commit, Counts, counts_of
from vqmill.contents import ShardFindings, check_shard, check_sizes
from vqmill.errors import CodesError
from vqmill.files import PARTIAL_SUFFIX
from vqmill.places import Place, Where, place_of, read_file
from vqmill.problems import NO_DAMAGE, Problem, whole_commits
from vqmill.retries import retry_problems
from vqmill.spec import StoreSpec
from vqmill.store import Codes
from vqmill.stored import MAX_ARRAY_METADATA_BYTES
from vqmill.usage import StoreUsage
from vqmill.writer import READERS

THREADS = min(4, os.cpu_count() or 1)  # hashing and decoding release the GIL


@dataclass(frozen=True)
class Verification:
    """What `verify_store` found.

    Attributes:
        rows: code rows that the store counts.
        counts: input samples over all readable commit records.
        bytes_read: size of all files of Zarr shards that were read.
        used_codes: by level, or by stage of residual codes (`codes/0`, `codes/1`, ...), how many of the K codes occur; empty after a
            quick look.
        perplexity: by the same names, 2 to the entropy (bits) of the codes over the whole store; empty after a quick look.
        problems: all findings; empty when the store is finished and whole.
    """

    rows: int
    counts: Counts
    bytes_read: int
    used_codes: dict[str, int] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def damage(self) -> tuple[Problem, ...]:
        """The problems of what is committed; that more is to come is none."""
        return tuple(problem for problem in self.problems if problem.kind not in NO_DAMAGE)


def verify_store(
    path: Where,
    progress: Callable[[int, int], None] | None = None,
    *,
    quick: bool = False,
    again: str | None = None,
) -> Verification:
    """Checks metadata, commit records, checksums, tables and code ranges of a whole store.

    Args:
        path: the store's folder or address.
        progress: called with (Zarr shards done, Zarr shards in all).
        quick: read metadata and commit records only, and see that every file is there with its size.
        again: the command that made the store, when it is known: part of the advice.

    Raises:
        CodesError: not a store at all, or the group's own metadata is damaged.
    """
    place = place_of(path)
    spec = layout.read_spec(place)
    listed = place.list()
    links = tuple(name for name in listed if place.is_link(name))
    problems = [Problem("link", name, "a symbolic link; only plain files of the store are read") for name in links]
    problems += _metadata_problems(place, spec)
    commits = _read_commits(place, spec, listed, problems)
    problems += _order_problems(spec, commits)
    usage = StoreUsage(spec.levels)
    bytes_read = 0
    visible = [commit for commit in commits.values() if not _behind(links, spec, commit)]

    def check(commit: Commit) -> ShardFindings:
        return check_sizes(place, spec, commit, listed) if quick else check_shard(place, spec, commit)

    checks = _in_threads(lambda commit=commit: check(commit) for commit in visible)
    for done, findings in enumerate(checks, start=1):
        problems += findings.problems
        bytes_read += findings.bytes_read
        usage.merge(findings.usage)
        if progress:
            progress(done, spec.num_commits)
    problems += _foreign_files(spec, [name for name in listed if name not in links])
    if spec.complete and not quick and not problems and any(segment.retries for segment in spec.segments):
        problems += [Problem("counts", "zarr.json", text) for text in retry_problems(Codes(place, spec))]
    if layout.read_spec(place) != spec:
        raise CodesError(
            f"{place.name}: changed while it was verified: a job is writing it. Wait for it to end, and verify again."
        )
    if not spec.complete:
        problems.append(Problem("unfinished", "zarr.json", f"unfinished: {spec.num_rows:,} rows count so far"))
    return Verification(
        spec.num_rows,
        counts_of(spec, commits.values()),
        bytes_read,
        {} if quick else usage.used,
        {} if quick else usage.perplexity,
        _advised(place.name, spec, commits, problems, again),
    )


def rows_of(spec: StoreSpec, shard: int) -> int:
    """How many rows a committed Zarr shard has: all but the last are full."""
    return min(spec.rows_per_shard, spec.num_rows - shard * spec.rows_per_shard)


def _may_grow(spec: StoreSpec, shard: int) -> bool:
    """Whether a Zarr shard may have more rows than the group counts yet: the last one of a store that is being appended to."""
    return not spec.complete and shard == spec.num_commits - 1


def can_be_made_again(spec: StoreSpec) -> bool:
    """Whether the command that made a store makes lost parts of it again: `tokenize`, `merge` and `slice` do, `sample` does not."""
    return "copied" in spec.corpus or ("description" in spec.corpus and "sampled" not in spec.corpus)


def job_of(spec: StoreSpec, again: str | None) -> str:
    """The command that made a store, when it is known; else words for it."""
    tokenized = can_be_made_again(spec) and "copied" not in spec.corpus
    return again or f"the `vqmill{' tokenize' if tokenized else ''}` command that made the store"


def resumable_commits(spec: StoreSpec, problems: Iterable[Problem]) -> int | None:
    """How many commits the job that made a store can go on from after a repair, making lost files of them again; None when it cannot.

    It cannot when no commit is whole, or when one in the middle is lost, for it reads every record; nor when a retry lies behind the
    whole ones, for no job gives the samples again as they were before it.
    """
    problems = tuple(problems)
    whole = whole_commits(spec.num_commits, problems)
    lost = any(problem.kind == "record" and problem.shards and problem.shards[0] < whole for problem in problems)
    other = any(problem.kind in ("link", "counts") for problem in problems)
    retried = any(segment.retries and segment.first_row > whole * spec.rows_per_shard for segment in spec.segments)
    stuck = lost or other or retried or (whole == 0 and spec.num_commits > 0)
    return whole if can_be_made_again(spec) and not stuck else None


def lines_tried_again(spec: StoreSpec, problem: Problem) -> bool:
    """Whether a problem is of quarantine lines that a retry took up: no job makes them again, and a retry cannot be known without them."""
    last = max((segment.first_commit for segment in spec.segments if segment.retries), default=-1)
    return problem.file.startswith("quarantine/") and problem.shards is not None and problem.shards[0] <= last


def _in_threads(tasks: Iterable[Callable[[], ShardFindings]]) -> Iterator[ShardFindings]:
    """Results in order; no more are waiting than there are threads, so that memory is bounded."""
    waiting: deque[Future[ShardFindings]] = deque()
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            for task in tasks:
                waiting.append(threads.submit(task))
                if len(waiting) > 2 * THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(wait=True, cancel_futures=True)


def _metadata_problems(place: Place, spec: StoreSpec) -> Iterator[Problem]:
    """Whether each zarr.json says what the group's sealed part says, compared by meaning."""
    for name, expected in {**layout.array_metadata(spec), "zarr.json": layout.group_metadata(spec)}.items():
        array = name.split("/")[0] if "/" in name else None
        most = MAX_ARRAY_METADATA_BYTES if array else layout.MAX_METADATA_BYTES
        try:
            found: Any = json.loads(read_file(place, name, most))
            wanted: Any = json.loads(expected)
            if array is None:
                found, wanted = _known_keys(found, wanted), _known_keys(wanted, wanted)
            elif not spec.complete:
                found = _not_ahead(found, wanted)
            if found != wanted:
                yield Problem("metadata", name, "not what this store's metadata should be", array)
        except OSError as error:
            yield Problem("metadata", name, f"cannot be read: {error.strerror or error}", array)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            yield Problem("metadata", name, f"damaged: not the JSON of an array or a group ({error})", array)


def _known_keys(group: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A group's metadata without what later writers may add under our name, and without the checksum of it all."""
    ours = {key: value for key, value in group["attributes"]["vqmill"].items() if key in known["attributes"]["vqmill"]}
    return {**group, "attributes": {**group["attributes"], "vqmill": {**ours, "sha256": None}}}


def _not_ahead(array: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """An array's metadata with the rows that count: while a job writes, or after it was killed, the array may have more."""
    rows = wanted["shape"][0]
    return {**array, "shape": [rows, *array["shape"][1:]]} if array["shape"][0] > rows else array


def _read_commits(place: Place, spec: StoreSpec, names: Iterable[str], problems: list[Problem]) -> dict[int, Commit]:
    """The commit records that are whole and agree with the group, by Zarr shard; the others become problems."""
    there = sorted(
        shard
        for name in names
        if name.startswith("commits/") and (shard := shard_of(spec, name)) is not None and shard < spec.num_commits
    )
    with ThreadPoolExecutor(READERS) as threads:
        found = dict(zip(there, threads.map(partial(_read_commit, place), there), strict=True))
    expected = 0
    commits: dict[int, Commit] = {}
    for shard in [*there, spec.num_commits]:
        if expected < shard:
            text = "the commit record is missing" if expected == shard - 1 else "these commit records are missing"
            problems.append(Problem("record", layout.commit_file(expected), text, shards=(expected, shard - 1)))
        expected = shard + 1
        if shard == spec.num_commits:
            continue
        name = layout.commit_file(shard)
        commit = found[shard]
        if not isinstance(commit, Commit):
            text = str(commit).removeprefix(f"{place.name}/{name}: ").removesuffix(" Restore it from a copy.")
            problems.append(Problem("record", name, text.rstrip("."), shards=(shard, shard)))
            continue
        wrong = list(_contradictions(spec, shard, commit))
        problems += [Problem("record", name, text, shards=(shard, shard)) for text in wrong]
        if not wrong:
            commits[shard] = commit
    return commits


def _read_commit(place: Place, shard: int) -> Commit | Exception:
    try:
        return Commit.read(place, layout.commit_file(shard))
    except (CodesError, OSError) as error:
        return error


def _contradictions(spec: StoreSpec, shard: int, commit: Commit) -> Iterator[str]:
    first, rows = shard * spec.rows_per_shard, rows_of(spec, shard)
    more = _may_grow(spec, shard) and rows < commit.rows <= spec.rows_per_shard  # the group is written after the record
    if (commit.shard, commit.first_row, rows if more else commit.rows) != (shard, first, rows):
        yield (
            f"says Zarr shard {commit.shard} with {commit.rows:,} rows from row {commit.first_row:,}, "
            f"expected {shard} with {rows:,} from {first:,}"
        )
    expected = layout.shard_files(spec, shard, commit.rows)
    for name in sorted(set(expected) ^ set(commit.files)):
        yield f"{'leaves out' if name in expected else 'lists'} {name}"
    if commit.counts.encoded and not commit.rows and spec.num_rows == 0:
        yield f"{commit.counts.encoded:,} samples encoded into no rows"


def _order_problems(spec: StoreSpec, commits: Mapping[int, Commit]) -> Iterator[Problem]:
    """Whether cursors go forward, segments follow each other, and the counts add up to the plan."""
    plan = spec.segments[-1] if spec.segments else None
    before = (0, 0, 0)
    for shard, commit in commits.items():
        cursor = (commit.cursor.input_shard, commit.cursor.span, commit.cursor.row)
        if cursor < before:
            text = f"its cursor {cursor} lies before the {before} of a commit before it"
            yield Problem("record", layout.commit_file(shard), text, shards=(shard, shard))
        before = max(before, cursor)
    for number, segment in enumerate(spec.segments):
        last = spec.segments[number - 1] if number else None
        wrong = segment.first_commit != segment.first_row // spec.rows_per_shard
        if last is None:
            wrong = wrong or segment.first_row != 0 or segment.retries != 0
        else:
            wrong = wrong or any(
                getattr(segment, name) < getattr(last, name) for name in ("first_row", "input_shards", "num_samples")
            )
            wrong = wrong or bool(segment.retries and segment.num_samples - last.num_samples != segment.retries)
        if wrong or (spec.complete and segment.first_row > spec.num_rows):
            text = f"segment {number} (row {segment.first_row:,}, commit {segment.first_commit:,}) does not follow from those before it"
            yield Problem("counts", "zarr.json", text)
    if plan and plan.num_samples and spec.complete and len(commits) == spec.num_commits:
        seen = sum(commit.counts.seen for commit in commits.values())
        if seen != plan.num_samples:
            text = f"the plan has {plan.num_samples:,} samples, the commit records count {seen:,}"
            yield Problem("counts", "zarr.json", text)


SHARD_NUMBER = re.compile(r"[^/]+/(?:c/|part-|shard-)(\d{1,18})(?:/0)*(?:\.parquet|\.json)?")


def shard_of(spec: StoreSpec, name: str) -> int | None:
    """Which Zarr shard a file belongs to by its name; None for any other file."""
    match = SHARD_NUMBER.fullmatch(name)
    if match is None:
        return None
    shard = int(match[1])
    return shard if name in (layout.commit_file(shard), *layout.shard_files(spec, shard, 1)) else None


def _foreign_files(spec: StoreSpec, names: list[str]) -> Iterator[Problem]:
    known = {"zarr.json", *(f"{level.name}/zarr.json" for level in spec.levels), f"{layout.LABEL}/zarr.json"}
    for name in names:
        shard = shard_of(spec, name)
        if name in known:
            continue
        if shard is not None and shard < spec.num_commits:
            rows = spec.rows_per_shard if _may_grow(spec, shard) else rows_of(spec, shard)
            if name in (layout.commit_file(shard), *layout.shard_files(spec, shard, rows)):
                continue
        elif not spec.complete and (shard is not None or name.endswith(PARTIAL_SUFFIX)):
            yield Problem("pending", name, "not committed yet")
            continue
        yield Problem("leftover", name, "belongs to no commit (left by a killed job, or not the store's)")


def _behind(links: tuple[str, ...], spec: StoreSpec, commit: Commit) -> bool:
    files = layout.shard_files(spec, commit.shard, commit.rows)
    return any(name == link or name.startswith(f"{link}/") for link in links for name in files)


def _advised(
    store: str, spec: StoreSpec, commits: Mapping[int, Commit], problems: list[Problem], again: str | None
) -> tuple[Problem, ...]:
    """The problems with the input shards they concern, and what to do about each."""
    repair = f"vqmill repair {shlex.quote(store)}"
    job = job_of(spec, again)
    whole = resumable_commits(spec, problems)
    advised: list[Problem] = []
    for problem in problems:
        shards = problem.shards
        match problem.kind:
            case "unfinished" | "pending" | "reopened":
                advice = f"To finish it, run: {job}"
            case "leftover" | "metadata":
                advice = f"To mend it, run: {repair}"
            case "link":
                advice = "Copy the store with its links resolved (cp -rL)"
            case "counts":
                advice = "Restore the store's metadata and commit records from a copy"
            case "damaged" if lines_tried_again(spec, problem):
                advice = f"Restore it from a copy, or make the store again at another place: {job}"
            case "damaged" if whole is not None and not spec.complete and problem.wrong == "missing":
                advice = f"To make it again, run: {job}"
            case "damaged" if whole is not None:
                advice = f"To make it again, run: {repair}, then: {job}"
            case "record" | "content" if whole is not None and shards and shards[0] >= whole:
                advice = (
                    f"Restore it from a copy; or go back to the {whole:,} Zarr shards before it: {repair}, then: {job}"
                )
            case _:
                advice = f"Restore it from a copy, or make the store again at another place: {job}"
        advised.append(replace(problem, advice=advice, input_shards=_input_shards(spec, commits, problem)))
    return tuple(advised)


def _input_shards(spec: StoreSpec, commits: Mapping[int, Commit], problem: Problem) -> tuple[int, int] | None:
    """First and last input shard that may lie in a Zarr shard: from the cursor before it to its own.

    Cursors of copies count stores, those of stores with a retry its samples, too: they name no input shards of the corpus.
    """
    if (
        "copied" in spec.corpus
        or any(segment.retries for segment in spec.segments)
        or problem.shards is None
        or problem.shards[1] not in commits
    ):
        return None
    first, last = problem.shards
    if first and first - 1 not in commits:
        return None
    start = commits[first - 1].cursor.input_shard if first else 0
    end = commits[last].cursor
    return (start, max(start, end.input_shard - (end.span == 0 and end.row == 0)))
