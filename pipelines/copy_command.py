"""The commands `merge` and `slice`: stores from stores of the same tokenizer, without encoding again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.copying import CopyResult, copy_rows
from pipelines.joining import joined_spec, shared_keys
from pipelines.options import Codec, row_range
from pipelines.outputs import lies_in, run_record
from pipelines.progress import meter
from pipelines.results import Result
from pipelines.selection import Source, part_of_store, whole_store
from pipelines.tokenize_command import recorded_tokenizer, relative_to_store, run_file
from vqmill.commits import Counts
from vqmill.errors import UsageError
from vqmill.files import canonical_json
from vqmill.layout import read_spec
from vqmill.spec import MISSING_LABEL, StoreSpec
from vqmill.store import Codes, open_codes


def merge(stores: Sequence[str | Path], out: str | Path, *, shard_rows: int | None, codec: Codec) -> Result:
    """Runs the command; see `vqmill merge --help`."""
    if not stores:
        raise UsageError("name the stores to merge: vqmill merge A.zarr B.zarr --out C.zarr")
    _check(stores, out, shard_rows)
    opened = [_finished(store) for store in stores]
    sources: list[Source] = []
    with meter("reading samples", "rows") as show:
        total = sum(len(codes) for codes in opened)
        for codes in opened:
            before = sum(len(source.rows) for source in sources)
            sources.append(whole_store(codes, lambda done, _, before=before: show(before + done, total)))
    if not total:
        raise UsageError(f"{', '.join(map(str, stores))}: no rows there to merge.")
    description = f"merge of {', '.join(map(str, stores))}"
    spec = joined_spec(sources, description, skipped=True, rows_per_shard=shard_rows, codec=_chosen(codec))
    shared = shared_keys(sources)
    lines = []
    if shared:
        lines.append(
            f"{shared:,} sample keys occur in more than one of the stores: where they name the same images, these count twice; "
            "splits by key keep equal keys on one side"
        )
    return _copy(sources, out, spec, [*_raised(shard_rows, spec), *lines], {"shared_keys": shared})


def slice_store(
    store: str | Path,
    out: str | Path,
    *,
    rows: str | None,
    labels: Sequence[int] | None,
    shard_rows: int | None,
    codec: Codec,
) -> Result:
    """Runs the command; see `vqmill slice --help`."""
    if rows is None and not labels:
        raise UsageError("say which rows: --rows START:STOP, --label NUMBER, or both.")
    if labels and min(labels) < MISSING_LABEL:
        raise UsageError(
            f"--label {min(labels)}: expected a class number, or {MISSING_LABEL} for rows without a label."
        )
    _check([store], out, shard_rows)
    codes = _finished(store)
    wanted = row_range(rows, len(codes)) if rows is not None else range(len(codes))
    with meter("reading samples", "rows") as show:
        source = part_of_store(codes, wanted, labels or None, show)
    chosen = " or ".join(map(str, sorted(set(labels or ()))))
    where = (f"rows {wanted.start}:{wanted.stop}" if rows is not None else "rows") + (
        f" with label {chosen}" if labels else ""
    )
    if not len(source.rows):
        raise UsageError(f"{store}: no {where} there.")
    spec = joined_spec([source], f"{where} of {store}", skipped=False, rows_per_shard=shard_rows, codec=_chosen(codec))
    found = {label: source.labels.get(label, 0) for label in sorted(set(labels or ()))}
    lines = [f"label {label}: {count:,} rows" for label, count in found.items()]
    return _copy(
        [source],
        out,
        spec,
        [*_raised(shard_rows, spec), *lines],
        {"labels": {str(label): count for label, count in found.items()}},
    )


def _finished(store: str | Path) -> Codes:
    """Opens a store that no job has begun to append to: its last rows are about to be written anew.

    Raises:
        UsageError: it is unfinished.
    """
    if not read_spec(store).complete:
        raise UsageError(f"{store}: unfinished: a job writes it, or was stopped. Let it finish first.")
    return open_codes(store)


def _check(stores: Sequence[str | Path], out: str | Path, shard_rows: int | None) -> None:
    """Refuses what cannot be, before anything is read."""
    if shard_rows is not None and shard_rows < 1:
        raise UsageError(f"--shard-rows must be at least 1, got {shard_rows}.")
    for store in stores:
        if lies_in(out, store) or lies_in(store, out):
            raise UsageError(f"--out {out}: is, holds or lies inside {store}, which is read. Choose a place outside.")


def _chosen(codec: Codec) -> str | None:
    return None if codec == "auto" else codec


def _copy(
    sources: Sequence[Source], out: str | Path, spec: StoreSpec, lines: list[str], facts: dict[str, Any]
) -> Result:
    with meter("copying", "rows") as show:
        made = copy_rows(sources, out, spec, show)
    counts = made.counts + Counts(skipped=sum(spec.corpus["skipped"].values()))
    new = made.rows - made.resumed_rows
    tokenizer = _tokenizer_of(sources)
    if made.did_something or not run_file(out).exists():
        run_file(out).write(canonical_json(_record(sources, out, made, counts, tokenizer)))
    stores = f"{len(sources)} stores" if len(sources) > 1 else sources[0].codes.place.name
    head = f"{out}: {made.rows:,} rows of {stores} ({new:,} of them copied in this run, {made.resumed_rows:,} found committed)"
    if made.mended:
        mended = ", ".join(map(str, made.mended))
        lines = [f"made again, as files of them were missing or damaged: Zarr shards {mended}", *lines]
    if tokenizer is None and "module" not in spec.tokenizer:
        lines = [
            *lines,
            f"no record says where the tokenizer is: name it for `vqmill decode {out}` with --tokenizer DIR",
        ]
    facts = {
        "out": str(out),
        "resumed_rows": made.resumed_rows,
        "mended_shards": list(made.mended),
        "fingerprint": spec.tokenizer["fingerprint"],
        "sources": [{"store": source.codes.place.name, "rows": len(source.rows)} for source in sources],
        **facts,
    }
    return Result([head, *lines], counts, made.rows, facts, quarantine=f"{out}/quarantine")


def _raised(shard_rows: int | None, spec: StoreSpec) -> list[str]:
    if shard_rows in (None, spec.rows_per_shard):
        return []
    return [f"--shard-rows {shard_rows} was raised to {spec.rows_per_shard}, which divides into good chunks"]


def _record(
    sources: Sequence[Source], out: str | Path, made: CopyResult, counts: Counts, tokenizer: Path | None
) -> dict[str, Any]:
    place = {} if tokenizer is None else {"tokenizer": relative_to_store(tokenizer, out)}
    stores = [relative_to_store(source.codes.place, out) for source in sources]
    return run_record(sources=stores, rows=made.rows, counts=asdict(counts), seconds=made.seconds, **place)


def _tokenizer_of(sources: Sequence[Source]) -> Path | None:
    """The tokenizer's folder, from the first record that is beside a source and names one; the sources share the tokenizer."""
    for source in sources:
        try:
            return recorded_tokenizer(source.codes.place)
        except UsageError:
            continue
    return None
