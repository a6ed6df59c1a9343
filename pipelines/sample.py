"""The command `sample`: from a prior to codes to new images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import priors
from pipelines.foreign import load_tokenizer, store_record
from pipelines.options import Device, choose_device
from pipelines.outputs import require_room, run_record
from pipelines.pictures import check_columns, check_picture, good_scale, image_grid, save_picture
from pipelines.progress import meter
from pipelines.results import Result
from pipelines.tokenize_command import run_file, tokenizer_place
from tokenizer.protocol import ImageTokenizer
from vqmill.commits import Counts, Cursor
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, write_whole
from vqmill.layout import smallest_codec
from vqmill.settings import did_you_mean
from vqmill.spec import LevelSpec, Segment, StoreSpec, default_rows_per_shard
from vqmill.tables import QUARANTINE_SCHEMA, SAMPLES_SCHEMA
from vqmill.writer import StoreWriter, write_shard


def sample(
    prior_path: Path, tokenizer_path: Path | None, out: Path, *, module: str | None, num: int, seed: int, label: str | None, temperature: float,
    codes: Path | None, columns: int | None, batch_size: int, device: Device,
) -> Result:  # fmt: skip
    """Runs the command; see `vqmill sample --help`."""
    prior, model = priors.load(prior_path), load_tokenizer(tokenizer_path, module)
    labels = _labels(label, num, prior.config.num_classes)
    settings = {
        "prior": prior.fingerprint, "tokenizer": model.fingerprint, "num": num, "seed": seed, "label": label,
        "temperature": temperature, "columns": columns,
    }  # fmt: skip
    try:
        prior.config.check_tokenizer(model.fingerprint)
    except CodesError as error:
        raise UsageError(f"{prior_path} with {tokenizer_path or module}: {error}") from error
    check_picture(out, settings)
    check_columns(columns)
    chosen = choose_device(device)
    spec = _spec(prior, model, settings)
    if codes is not None:
        require_room(codes, num * spec.row_bytes)
        StoreWriter(codes, spec).close()  # refuses a place that holds something else, before the drawing
    with meter("sampling", "codes") as show:
        try:
            drawn = priors.sample(
                prior,
                num,
                labels,
                seed=seed,
                drawing=priors.Drawing(temperature=temperature),
                batch_size=batch_size,
                device=chosen,
                progress=show,
            )
        except CodesError as error:
            raise UsageError(str(error)) from error
    images = _decode(model, drawn, chosen, batch_size)
    if columns is None:
        columns = prior.config.num_classes if label == "each" else max(1, round(num**0.5))
    save_picture(out, image_grid(images, columns, good_scale(images.shape[-1])), settings)
    lines = [f"made {out}: {num} images, seed {seed}"]
    facts: dict[str, Any] = {"out": str(out), "seed": seed}
    if codes is not None:
        _write_codes(codes, spec, {name: values.numpy() for name, values in drawn.items()}, labels, images.shape[-1])
        write_whole(
            run_file(codes),
            canonical_json(run_record(**tokenizer_place(tokenizer_path, module, codes), settings=settings)),
        )
        lines.append(f"made {codes}: {num} rows")
        facts["codes"] = str(codes)
    return Result(lines, Counts(encoded=num), num, facts)


def _labels(label: str | None, num: int, num_classes: int) -> torch.Tensor | None:
    """int64 [num], or None for any class.

    Raises:
        UsageError: not a class, or the prior knows no classes.
    """
    if num < 1:
        raise UsageError(f"--num must be at least 1, got {num}.")
    if label is None:
        return None
    if num_classes == 0:
        raise UsageError("--label: this prior was trained without labels; leave the flag out.")
    if label == "each":
        return torch.arange(num) % num_classes
    if not label.isdecimal():
        raise UsageError(
            f"--label {label!r}: expected a class number 0..{num_classes - 1}, or each.{did_you_mean(label, ['each'])}"
        )
    if int(label) >= num_classes:
        raise UsageError(f"--label {label}: this prior knows the classes 0..{num_classes - 1}.")
    return torch.full((num,), int(label))


def _decode(
    model: ImageTokenizer, codes: dict[str, torch.Tensor], device: str, batch_size: int
) -> np.ndarray[Any, Any]:
    model.to(device)
    number = len(next(iter(codes.values())))
    parts = []
    for first in range(0, number, batch_size):
        batch = {name: values[first : first + batch_size] for name, values in codes.items()}
        parts.append(model.decode(batch).cpu())
    return torch.cat(parts).numpy()


def _spec(prior: priors.Prior, model: ImageTokenizer, settings: dict[str, Any]) -> StoreSpec:
    levels = tuple(LevelSpec(level.name, level.codebook_size, level.grid) for level in prior.config.levels)
    return StoreSpec(
        levels=levels,
        rows_per_shard=default_rows_per_shard(levels),
        tokenizer={name: value for name, value in store_record(model).items() if name != "preset"},
        corpus={"sampled": settings},
        segments=(Segment(f"sampled from {settings['prior']}", 0, 0, 1, settings["num"]),),
    )


def _write_codes(
    path: Path, spec: StoreSpec, codes: dict[str, np.ndarray[Any, Any]], labels: torch.Tensor | None, side: int
) -> None:
    number = len(next(iter(codes.values())))
    with StoreWriter(path, spec) as writer:
        if writer.spec.complete:
            return
        if writer.spec.codec is None:
            writer.choose_codec(
                smallest_codec(spec, {name: values[: spec.rows_per_shard] for name, values in codes.items()})
            )
        for first in range(writer.spec.num_rows, number, spec.rows_per_shard):
            rows = range(first, min(number, first + spec.rows_per_shard))
            known = [
                {"key": f"sample-{row:08d}", "source": "sampled", "input_shard": 0, "index": row, "width": side, "height": side,
                 "label": None if labels is None else int(labels[row])}
                for row in rows
            ]  # fmt: skip
            files = write_shard(
                path, writer.spec, writer.spec.num_commits, {name: values[rows.start : rows.stop] for name, values in codes.items()},
                pa.Table.from_pylist(known, schema=SAMPLES_SCHEMA), QUARANTINE_SCHEMA.empty_table(),
            )  # fmt: skip
            writer.commit(len(rows), Cursor(0, 0, rows.stop), Counts(encoded=len(rows)), files)
        writer.finish()
