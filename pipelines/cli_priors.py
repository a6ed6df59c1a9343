"""The command `score`; cli.py adds it to the app."""

from __future__ import annotations

from pathlib import Path

from pipelines.app import run
from pipelines.options import Common, Device


def score(
    prior: Path, store: Path, /, *, out: Path, rows: str = ":", tokenizer: Path | None = None, tokenizer_module: str | None = None,
    num: int = 8, batch_size: int = 32, device: Device = "auto", common: Common = Common(),
) -> int:  # fmt: skip
    """Say how surprising each row of a code store is to a prior, in bits, and where in it the surprise is.

    Odd, mislabelled and broken samples cost more bits than others of their class: look at the rows of highest z. Each row is read given
    its label, rows without one as of any class. Rows that the prior was trained on look likelier than they should.

        vqmill score runs/prior codes.zarr --out runs/scores

    Writes into OUT:

    - `scores.parquet`: for each row its number, key, label, `bits` (-log2 of its probability), `bits_per_code`, `LEVEL/bits`, and how many
      standard deviations its bits lie above the mean of these rows (`z`) and of these rows of its label (`label_z`, empty without a
      label and for a label's only row).
    - `maps.zarr`: a Zarr v3 group with an array for each level, bits of each code, float16 [N, h, w], in the order of the table:
      `zarr.open_group("runs/scores/maps.zarr", mode="r")["top"][0:8]`.
    - `least_and_most_likely.png`: the image, decoded, beside the bits of its codes: black is 0, over red and yellow, white 16 or more.
    - `score.json`: means for each level, beside the baselines that any prior must beat, and for each label; `run.json`.

    Args:
        prior: the folder that train-prior wrote.
        store: a finished code store, made by the tokenizer that the prior is bound to.
        out: the folder to make.
        rows: START:STOP, which rows; either side may be left out. Means and z are of these rows.
        tokenizer: the folder of the tokenizer that made the codes, for the picture; the one recorded beside the store if not given. If
            none is known, codes are drawn as colours.
        tokenizer_module: package.module:factory, when your own code made them; a store never imports code by itself.
        num: how many rows are shown at either end.
        batch_size: rows at once; changes the bits no more than the device rounds differently.
        device: auto takes the GPU if there is one.
    """
    from pipelines.score import ScoreOptions
    from pipelines.score import score as job

    options = ScoreOptions(rows=rows, num=num, batch_size=batch_size, device=device)
    return run(common, lambda: job(prior, store, out, options, tokenizer_path=tokenizer, module=tokenizer_module))
