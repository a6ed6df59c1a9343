"""The command `score`: how surprising each row of a store is to a prior, and where."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
from PIL import Image

import priors
from pipelines.class_names import label_words, name_of
from pipelines.decode import decode_rows, load_tokenizer_of
from pipelines.options import Device, choose_device, row_range
from pipelines.outputs import RUN_FILE, OutputFolder, refuse_inside, require_room, run_record
from pipelines.pictures import Panel, code_panels, good_scale, row_captions, save_picture, side_by_side, stacked
from pipelines.prior_inputs import BASELINE_CODES, check_labels, check_store, evenly
from pipelines.progress import Meter, meter
from pipelines.results import Result
from pipelines.surprise import Floats, bits_bar, ends, has_peers, heat, z_scores
from pipelines.trained_rows import HELD_OUT, TRAINED, UNKNOWN, Training, read_training, trained_on
from tokenizer.protocol import ImageTokenizer
from vqmill import Codes, open_codes
from vqmill.commits import Counts
from vqmill.errors import CodesError, UsageError
from vqmill.files import canonical_json, sync_folder, write_whole
from vqmill.spec import MISSING_LABEL

SCORE_FILE = "score.json"
TABLE_FILE = "scores.parquet"
MAPS_FOLDER = "maps.zarr"
PICTURE_FILE = "least_and_most_likely.png"
MAP_CHUNK_CODES = 1 << 20  # of each level: 2 MiB of float16, which is also what is held before it is written
ROW_BYTES = 256  # of the table: a key and the figures
MAX_NUM = 1024
COLUMNS = 4
CODES_SIDE = 64  # pixels of a grid of codes, when there is no image to be as large as
LISTED = 5
TRAINING_WORDS = {True: "trained on", False: "not trained on", None: "trained on or not, which is not known"}


@dataclass(frozen=True)
class ScoreOptions:
    """How to score; see `vqmill score --help`."""

    rows: str = ":"
    num: int = 8
    batch_size: int = 32
    device: Device = "auto"


@dataclass(frozen=True)
class _Job:
    """What is to be scored, resolved."""

    prior: priors.Prior
    codes: Codes
    rows: range
    labels: np.ndarray[Any, Any]
    training: Training | None
    trained: np.ndarray[Any, Any]  # of each row: TRAINED, HELD_OUT or UNKNOWN
    model: ImageTokenizer | None
    notes: list[str]
    options: ScoreOptions
    device: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The store's, whose labels these are; else the prior's."""
        return self.codes.class_names or self.prior.class_names

    @property
    def settings(self) -> dict[str, Any]:
        """All that shapes the output, but for how devices and batches round, and whether the store of the training is still there."""
        return {
            "command": "score", "prior": self.prior.fingerprint, "store": self.codes.spec.settings(), "store_rows": len(self.codes),
            "rows": [self.rows.start, self.rows.stop], "num": self.options.num, "picture": "images" if self.model else "codes",
            "holdout": self.training and self.training.fraction,
        }  # fmt: skip


def score(
    prior_path: Path,
    store: str | Path,
    out: Path,
    options: ScoreOptions,
    *,
    tokenizer_path: Path | None,
    module: str | None,
) -> Result:
    """Runs the command; see `vqmill score --help`."""
    if options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {options.batch_size}.")
    if not 1 <= options.num <= MAX_NUM:
        raise UsageError(f"--num must lie in 1..{MAX_NUM:,}, got {options.num}.")
    refuse_inside(out, str(store), "store")
    device = choose_device(options.device)
    prior, codes = priors.load(prior_path), open_codes(store)
    check_store(prior.config, prior_path, codes)
    rows = row_range(options.rows, len(codes))
    labels = codes.label_array[rows.start : rows.stop]
    notes = check_labels(prior, prior_path, codes, rows, labels)
    try:
        model = load_tokenizer_of(codes, tokenizer_path, module)
    except UsageError as error:
        if tokenizer_path or module:
            raise
        model, notes = None, [*notes, f"the picture shows codes as colours, not images: {error}"]
    training = read_training(prior_path, prior.fingerprint)
    trained, unknown = trained_on(training, codes, rows)
    notes += [f"{prior_path}: {unknown}"] if unknown else []
    job = _Job(prior.to(device), codes, rows, labels, training, trained, model, notes, options, device)
    if model:
        model.to(device)
    require_room(out, len(rows) * (ROW_BYTES + 2 * sum(level.num_codes for level in prior.config.levels)))
    with OutputFolder(out, job.settings) as place:
        if not place.finished:
            record = _write(job, place.folder) | {"place": str(prior_path), "store": str(store)}
            run = run_record(
                prior=str(prior_path), store=str(store), tokenizer=tokenizer_path and str(tokenizer_path), tokenizer_module=module,
                settings=job.settings, device=device,
            )  # fmt: skip
            write_whole(place.folder / RUN_FILE, canonical_json(run))
            write_whole(place.folder / SCORE_FILE, canonical_json(record))
            place.finish()
    result = score_result(out)
    if place.finished:
        result.lines.insert(0, f"{out}: already scored with these settings; nothing to do.")
    result.lines.append(
        f"made {', '.join(str(out / name) for name in (TABLE_FILE, MAPS_FOLDER, PICTURE_FILE, SCORE_FILE))}"
    )
    return result


def _write(job: _Job, folder: Path) -> dict[str, Any]:
    """Scores, and fills the output folder; gives JSON with all that is printed."""
    with meter("scoring", "rows") as show:
        maps, bits = _write_maps(job, folder / MAPS_FOLDER, show)
    total = sum(bits.values(), np.zeros(len(job.rows)))
    table = _figures(job, bits, total)
    _write_table(job, table, folder / TABLE_FILE)
    least, most = ends(total, job.options.num)
    save_picture(folder / PICTURE_FILE, _picture(job, maps, {"least likely": least, "most likely": most}), job.settings)
    for path in (folder, *folder.rglob("*")):  # zarr and pyarrow leave this to the kernel
        sync_folder(path)
    return {
        "prior": job.prior.fingerprint, "tokenizer": job.prior.config.tokenizer_fingerprint, "row_range": [job.rows.start, job.rows.stop],
        "levels": [_level_record(job, level, bits[level.name]) for level in job.prior.config.levels],
        "bits": float(total.mean()), "bits_deviation": float(total.std()), "bits_per_code": float(table["bits_per_code"].mean()),
        "training": _training_records(job, table), "labels": _label_records(job, total), "notes": job.notes,
        "least_likely": _named(job, table, least), "most_likely": _named(job, table, most),
        "oddest_of_label": _named(job, table, np.argsort(-np.nan_to_num(table["label_z"], nan=-math.inf), kind="stable")[: job.options.num]),
    }  # fmt: skip


def _write_maps(job: _Job, path: Path, show: Meter) -> tuple[dict[str, zarr.Array[Any]], dict[str, Floats]]:
    """Writes bits per code; gives the arrays [N, h, w], and bits per row, float64 [N], by level."""
    levels, number = job.prior.config.levels, len(job.rows)
    block = min(number, max(1, MAP_CHUNK_CODES // max(level.num_codes for level in levels)))
    attributes = {"unit": "bits per code", "prior": job.prior.fingerprint, "first_row": job.rows.start}
    group = zarr.create_group(path, overwrite=True, attributes=attributes)
    maps = {
        level.name: group.create_array(
            level.name, shape=(number, *level.grid), chunks=(block, *level.grid), dtype=np.float16,
            fill_value=math.nan, dimension_names=("row", "y", "x"),
        )
        for level in levels
    }  # fmt: skip
    bits = {level.name: np.empty(number) for level in levels}
    for first in range(0, number, block):
        stop = min(first + block, number)
        held = {level.name: np.empty((stop - first, *level.grid), np.float16) for level in levels}
        for start in range(first, stop, job.options.batch_size):
            end = min(start + job.options.batch_size, stop)
            for name, values in _bits_per_code(job, start, end).items():
                bits[name][start:end] = values.sum((1, 2), dtype=np.float64)
                held[name][start - first : end - first] = values
            show(end, number)
        for name, array in maps.items():
            array[first:stop] = held[name]
    return maps, bits


def _bits_per_code(job: _Job, start: int, end: int) -> dict[str, np.ndarray[Any, Any]]:
    """Bits of each code of the chosen rows start..end-1, float32 [n, h, w] by level.

    Raises:
        CodesError: they are no numbers, or more than float16 holds.
    """
    first, last = job.rows[start], job.rows[end - 1] + 1
    arrays = {name: job.codes[name][first:last] for name in job.prior.levels} | {"label": job.labels[start:end]}
    batch = {name: torch.from_numpy(values.astype(np.int64)).to(job.device) for name, values in arrays.items()}
    bits = {name: values.cpu().numpy() for name, values in priors.bits_per_code(job.prior, batch).items()}
    for name, values in bits.items():
        if not (values <= np.finfo(np.float16).max).all():
            raise CodesError(
                f"{job.codes.place.name}: level '{name}' costs {values.max():g} bits a code somewhere in rows {first}..{last - 1}: the prior "
                f"{job.prior.fingerprint} has diverged. Train it again, with a smaller --learning-rate."
            )
    return bits


def _figures(job: _Job, bits: Mapping[str, Floats], total: Floats) -> dict[str, np.ndarray[Any, Any]]:
    """The table's columns of figures, each [N]; NaN in `label_z` and `trained_on_z` where there is nothing to compare with."""
    num_codes = sum(level.num_codes for level in job.prior.config.levels)
    among = {
        name: np.where(has_peers(groups), z_scores(total, groups), math.nan)
        for name, groups in (("label_z", job.labels), ("trained_on_z", job.trained))
    }
    each = {f"{name}/bits": values for name, values in bits.items()}
    return {"bits": total, "bits_per_code": total / num_codes, "z": z_scores(total), **among, **each}


def _write_table(job: _Job, figures: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """One Parquet row group for each Zarr shard of the store, whose keys are read one part after the other."""
    fields = [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("label", pa.int64()),
        ("trained_on", pa.bool_()),
        *((name, pa.float64()) for name in figures),
    ]
    step = job.codes.spec.rows_per_shard
    with pq.ParquetWriter(path, pa.schema(fields), compression="zstd") as writer:
        for shard_start in range(job.rows.start // step * step, job.rows.stop, step):
            first, stop = max(shard_start, job.rows.start), min(shard_start + step, job.rows.stop)
            part = slice(first - job.rows.start, stop - job.rows.start)
            labels, trained = job.labels[part], job.trained[part]
            columns = {
                "row": np.arange(first, stop), "key": job.codes.samples(first, stop)["key"],
                "label": pa.array(labels, mask=labels == MISSING_LABEL),
                "trained_on": pa.array(trained == TRAINED, mask=trained == UNKNOWN),
                **{name: pa.array(values[part], mask=np.isnan(values[part])) for name, values in figures.items()},
            }  # fmt: skip
            writer.write_table(pa.table(columns, schema=pa.schema(fields)))


def _picture(job: _Job, maps: Mapping[str, zarr.Array[Any]], shown: Mapping[str, np.ndarray[Any, Any]]) -> Image.Image:
    """The images and where their bits are, those of each end in a line of panels, over what the colours of bits mean."""
    side = -(-CODES_SIDE // (widest := max(max(level.grid) for level in job.prior.config.levels))) * widest
    sheets = []
    for title, places in shown.items():
        if not len(places):
            continue
        rows = places + job.rows.start
        codes = {name: job.codes[name][rows] for name in job.codes.levels}
        panels = [Panel("images", decode_rows(job.model, codes))] if job.model else code_panels(codes, side)
        side = panels[0].images.shape[-1]
        captions = row_captions(job.codes, rows)
        panels[0] = replace(panels[0], title=f"{title}: {panels[0].title}", captions=captions)
        panels += [
            Panel(f"bits per code: {name}", heat(np.asarray(array.oindex[places]), side))
            for name, array in maps.items()
        ]
        sheets.append(side_by_side(panels, min(COLUMNS, job.options.num), good_scale(side)))
    return stacked([*sheets, bits_bar()])


def _level_record(job: _Job, level: priors.LevelShape, bits: Floats) -> dict[str, Any]:
    """A level's mean beside its baselines, which are counted on these rows, or on as many of them as are enough."""
    rows = evenly(np.arange(job.rows.start, job.rows.stop), max(1, BASELINE_CODES // level.num_codes))
    crude = priors.baselines(job.codes[level.name][rows], level.codebook_size)
    return {
        "name": level.name,
        "bits_per_code": float(bits.mean()) / level.num_codes,
        "baseline_rows": len(rows),
        **asdict(crude),
    }


def _training_records(job: _Job, table: Mapping[str, np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    """Means of the rows that were held out, of those that were trained on, and of those of which it is not known; of those that there are."""
    records = []
    for known, state in ((False, HELD_OUT), (True, TRAINED), (None, UNKNOWN)):
        if (here := job.trained == state).any():
            means = {name: float(table[name][here].mean()) for name in ("bits", "bits_per_code", "z")}
            records.append({"trained_on": known, "rows": int(here.sum()), **means})
    return records


def _label_records(job: _Job, total: Floats) -> list[dict[str, Any]]:
    """One entry for each label that occurs; label -1 is of rows without one."""
    labels, places, numbers = np.unique(job.labels, return_inverse=True, return_counts=True)
    means = np.bincount(places, total) / numbers
    return [
        {"label": label, "name": name_of(label, job.class_names), "rows": number, "bits": bits}
        for label, number, bits in zip(labels.tolist(), numbers.tolist(), means.tolist(), strict=True)
    ]


def _named(job: _Job, table: Mapping[str, np.ndarray[Any, Any]], places: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    rows, trained = places + job.rows.start, {TRAINED: True, HELD_OUT: False, UNKNOWN: None}
    keys = job.codes.samples_at(rows)["key"].to_pylist()
    return [
        {"row": int(row), "key": key, "label": int(job.labels[place]), "name": name_of(int(job.labels[place]), job.class_names),
         "trained_on": trained[int(job.trained[place])], "bits": float(table["bits"][place]), "z": float(table["z"][place]),
         "label_z": None if np.isnan(table["label_z"][place]) else float(table["label_z"][place])}
        for row, key, place in zip(rows, keys, places, strict=True)
    ]  # fmt: skip


def score_result(out: Path) -> Result:
    """What the record says, so that a repeated command says the same, and `inspect`."""
    record = json.loads((out / SCORE_FILE).read_bytes())
    first, stop = record["row_range"]
    lines = [*record["notes"]]
    lines.append(
        f"{record['place']} (prior {record['prior']}) on {record['store']}: {stop - first:,} rows, {first}..{stop - 1}"
    )
    lines += [
        f"  level {level['name']}: {level['bits_per_code']:.3f} bits per code (uniform {level['uniform']:.3f}, unigram "
        f"{level['unigram']:.3f}, bigram {level['bigram']:.3f})"
        for level in record["levels"]
    ]
    lines.append(
        f"  in all: {record['bits_per_code']:.3f} bits per code, {record['bits']:,.1f} a row (standard deviation {record['bits_deviation']:,.1f})"
    )
    sides = record.get("training", [])
    lines += [
        f"  {TRAINING_WORDS[side['trained_on']]}: {side['rows']:,} rows, {side['bits_per_code']:.3f} bits per code, {side['bits']:,.1f} a row, "
        f"z {side['z']:+.2f} on average"
        for side in sides
        if len(sides) > 1 or side["trained_on"] is not None  # else a note has said that it is not known
    ]
    lines += ["least likely:", *map(_entry_line, record["least_likely"][:LISTED])]
    if odd := [entry for entry in record["oddest_of_label"][:LISTED] if entry["label_z"] is not None]:
        lines += ["least likely beside others of their label:", *map(_entry_line, odd)]
    return Result(lines, Counts(encoded=stop - first), stop - first, record | {"out": str(out)})


def _entry_line(entry: Mapping[str, Any]) -> str:
    label = entry["label"]
    words = "" if label == MISSING_LABEL else f", {label_words(label, entry['name'])}"
    if entry["trained_on"] is not None:
        words += f", {TRAINING_WORDS[entry['trained_on']]}"
    among = "" if entry["label_z"] is None else f", label_z {entry['label_z']:+.2f}"
    return f"  row {entry['row']}: {entry['key']}{words}: {entry['bits']:,.1f} bits, z {entry['z']:+.2f}{among}"
