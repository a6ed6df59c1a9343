"""The commands `verify` and `repair`: whether a store is whole, and what can be done when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipelines.outputs import recorded_command
from pipelines.progress import meter
from pipelines.results import FAILED, OK, Result
from pipelines.tokenize_command import run_file
from vqmill.commits import Counts
from vqmill.layout import read_spec
from vqmill.repair import repair_store
from vqmill.spec import StoreSpec
from vqmill.usage import counted_names, title
from vqmill.verify import verify_store


def verify(store: str | Path, *, quick: bool) -> Result:
    """Runs the command; see `vqmill verify --help`."""
    spec = read_spec(store)
    with meter("verifying", "Zarr shards") as show:
        found = verify_store(store, show, quick=quick, again=recorded_command(run_file(store), store))
    counts = found.counts + Counts(skipped=sum(dict(spec.corpus.get("skipped", {})).values()))
    lines = [f"PROBLEM {problem}" for problem in found.damage]
    read = "metadata and sizes only" if quick else f"{found.bytes_read / 1e6:,.1f} MB read"
    lines.append(
        f"{store}: {found.rows:,} rows, {read}; seen {counts.seen:,} = encoded {counts.encoded:,} + "
        f"quarantined {counts.quarantined:,} + skipped {counts.skipped:,}"
    )
    pending = sum(problem.kind == "pending" for problem in found.problems)
    for problem in found.problems:
        if problem.kind == "unfinished":
            more = f"; {pending:,} files are not committed yet" if pending else ""
            lines += [f"{problem.wrong}{more}. {problem.advice}"]
            lines += ["samples of a span that is half committed are counted when the rest of it is"]
    if not found.damage:
        lines += usage_lines(spec, found.used_codes, found.perplexity)
        all_well = (
            "every file is there with its size; what is in them was not read"
            if quick
            else "every checksum, code and row is right"
        )
        lines.append(all_well if spec.complete else f"of what is committed, {all_well}")
    else:
        lines.append(f"{len(found.damage):,} problem{'s' if len(found.damage) > 1 else ''}")
    facts = {
        "store": str(store),
        "complete": spec.complete,
        "problems": [problem.to_json() for problem in found.problems],
        "used_codes": found.used_codes,
        "perplexity": found.perplexity,
    }
    result = Result(lines, counts, found.rows, facts, quarantine=f"{store}/quarantine")
    if found.problems:
        result.code = FAILED
    return result


def repair(store: str | Path, *, dry_run: bool) -> Result:
    """Runs the command; see `vqmill repair --help`."""
    command = recorded_command(run_file(store), store)
    with meter("verifying", "Zarr shards") as show:
        made = repair_store(store, show, dry_run=dry_run, again=command)
    lines = [f"would do: {line}" if dry_run else line for line in made.done] or ["nothing to mend"]
    lines += [f"REMAINS {problem}" for problem in made.remaining]
    facts = {
        "store": str(store),
        "done": list(made.done),
        "remaining": [problem.to_json() for problem in made.remaining],
        "complete": made.complete,
        "dry_run": dry_run,
        "next": None if made.complete else made.next,
    }
    if not made.complete:
        lines.append(f"{'afterwards' if dry_run else 'to finish the store'}, run: {made.next}")
    whole = made.complete and not made.remaining and not (dry_run and made.done)
    if whole:
        lines.append(f"{store}: whole")
    return Result(lines, facts=facts, code=OK if whole else FAILED)


def usage_lines(spec: StoreSpec, used: Mapping[str, int], perplexity: Mapping[str, float]) -> list[str]:
    """One line for each level, or stage of residual codes: its grid, dtype, and how much of the codebook is used; none for what was not counted."""
    return [
        f"{title(name)}: {'x'.join(map(str, level.grid[0 if name == level.name else 1 :]))} {level.dtype}, {used[name]} of "
        f"{level.codebook_size} codes used ({used[name] / level.codebook_size:.1%}), perplexity {perplexity[name]:.1f}"
        for level in spec.levels
        for name in counted_names(level)
        if name in used
    ]
