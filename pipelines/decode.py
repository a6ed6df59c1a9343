"""The command `decode`: rows of a store back into pictures, beside the originals when they are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.corpus.decoding import decode_sample
from pipelines.corpus.plan import Plan, plan_corpus
from pipelines.corpus.samples import read_samples
from pipelines.foreign import FLAG, load_tokenizer
from pipelines.options import ImageFlags, choose_device, row_range
from pipelines.pictures import (
    Panel,
    Pixels,
    check_columns,
    check_picture,
    code_panels,
    good_scale,
    save_picture,
    side_by_side,
)
from pipelines.results import Result
from pipelines.retry import corpus_totals, tried_again, with_retries
from pipelines.tokenize_command import recorded_tokenizer
from tokenizer.protocol import ImageTokenizer
from vqmill import Codes, open_codes
from vqmill.commits import Counts
from vqmill.errors import CodesError, UsageError

BATCH_ROWS = 32
MAX_ROWS = 4096  # of one picture


def decode(
    store: str | Path,
    out: Path,
    *,
    rows: str | None,
    tokenizer_path: Path | None,
    module: str | None,
    originals: str | None,
    columns: int | None,
    gzip_tars: bool = False,
) -> Result:
    """Runs the command; see `vqmill decode --help`."""
    if gzip_tars and originals is None:
        raise UsageError("--gzip-tars says how a corpus is read. Give it together with --originals CORPUS.")
    codes = open_codes(store, allow_incomplete=True)
    first, stop = _row_range(rows, len(codes))
    model = load_tokenizer_of(codes, tokenizer_path, module)
    settings = {
        "segments": [segment.plan for segment in codes.spec.segments],
        "tokenizer": model.fingerprint,
        "rows": [first, stop],
        "originals": originals is not None,
        "columns": columns,
    }
    check_picture(out, settings)
    check_columns(columns)
    plan = _plan_of(codes, originals, gzip_tars) if originals else None
    wanted = {name: codes[name][first:stop] for name in codes.levels}
    images = decode_rows(model, wanted)
    side = images.shape[-1]
    panels = [Panel("reconstruction", images)]
    if plan:
        panels.insert(0, Panel("original", original_images(plan, codes, range(first, stop), side, model.channels)))
    panels += code_panels(wanted, side)
    picture = side_by_side(panels, columns or max(1, round((stop - first) ** 0.5)), good_scale(side))
    save_picture(out, picture, settings)
    return Result(
        [f"made {out}: rows {first}..{stop - 1} of {store}"],
        Counts(encoded=stop - first),
        stop - first,
        {"out": str(out)},
    )


def load_tokenizer_of(codes: Codes, path: Path | None, module: str | None) -> ImageTokenizer:
    """The tokenizer that made a store: as the flags say, or without them as the record beside the store says.

    Code is imported only when the user names it, never because a store does.

    Raises:
        UsageError: another tokenizer, or none is known.
    """
    if path is None and module is None:
        if recorded := codes.spec.tokenizer.get("module"):
            raise UsageError(
                f"{codes.place.name}: was made by a tokenizer outside of vqmill, which only you can allow to run: {FLAG} {recorded}"
            )
        path = recorded_tokenizer(codes.place)
    model = load_tokenizer(path, module)
    place, wanted = path or module, codes.spec.tokenizer["fingerprint"]
    if model.fingerprint != wanted:
        raise UsageError(
            f"{place} holds tokenizer {model.fingerprint}, but {codes.place.name} was made by {wanted}: its codes mean something else "
            "there. Name the folder of that tokenizer with --tokenizer."
        )
    model.to(choose_device("auto"))
    return model


def decode_rows(
    model: ImageTokenizer, codes: Mapping[str, np.ndarray[Any, Any]], batch_size: int = BATCH_ROWS
) -> Pixels:
    """Codes [N, *grid] by level -> uint8 [N, C, H, W], so many at once."""
    number = len(next(iter(codes.values())))
    parts = []
    for first in range(0, number, batch_size):
        batch = {
            name: torch.from_numpy(values[first : first + batch_size].astype(np.int64))
            for name, values in codes.items()
        }
        parts.append(model.decode(batch).cpu().numpy())
    return np.concatenate(parts)


def original_images(plan: Plan, codes: Codes, rows: range, size: int, channels: int) -> Pixels:
    """The images that rows were made from, read again from the corpus and prepared as the store says: uint8 [N, C, size, size].

    Raises:
        CodesError: the corpus has changed.
    """
    preprocessing = ImageFlags().or_recorded(codes.spec.preprocessing).preprocessing(size, channels)
    samples = codes.samples(rows.start, rows.stop).select(["input_shard", "index", "key"]).to_pylist()
    found: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
    for shard in sorted({sample["input_shard"] for sample in samples}):
        wanted = {sample["index"]: sample["key"] for sample in samples if sample["input_shard"] == shard}
        for sample in read_samples(plan.shards[shard], start=min(wanted)):
            if sample.index in wanted:
                if sample.key != wanted[sample.index]:
                    raise CodesError(
                        f"{plan.corpus}: expected sample {wanted[sample.index]!r}, found {sample.key!r}. The corpus has changed."
                    )
                found[shard, sample.index] = decode_sample(sample, preprocessing).pixels
            if sample.index >= max(wanted):
                break
    return np.stack([found[sample["input_shard"], sample["index"]] for sample in samples])


def _plan_of(codes: Codes, corpus: str, gzip_tars: bool) -> Plan:
    segments = codes.spec.segments
    plan = plan_corpus(corpus, gzip_tars=gzip_tars).cut_at(corpus_totals(segments))
    encoded = with_retries(plan, segments, tried_again(codes.place, codes.spec))
    if not segments or encoded.digest_of_first(segments[-1].input_shards) != segments[-1].plan:
        raise UsageError(
            f"--originals {corpus}: not the corpus that {codes.place.name} was made from ({codes.spec.corpus.get('description')})."
        )
    return plan


def _row_range(text: str | None, number: int) -> tuple[int, int]:
    rows = row_range(text, number)
    if len(rows) > MAX_ROWS:
        raise UsageError(f"--rows {text}: {len(rows):,} rows in one picture; ask for at most {MAX_ROWS:,}.")
    return rows.start, rows.stop
