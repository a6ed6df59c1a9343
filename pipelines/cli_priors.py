"""Commands about priors; cli.py adds them to the app."""

from __future__ import annotations

from pathlib import Path

from pipelines.app import run
from pipelines.options import Common, Device, FitFlags


def train_prior(
    store: str, /, *, out: Path, preset: str = "pixelcnn", config: Path | None = None, level: str = "all", holdout: float = 0.05,
    flags: FitFlags = FitFlags(), common: Common = Common(),
) -> int:  # fmt: skip
    """Train a prior on a code store: label -> top -> bottom, each level by itself, on true codes of the coarser ones.

    Writes OUT/prior.safetensors, metrics for each level, run.json. Stopped runs go on when the same command is given.

    Where --steps, --batch-size, --learning-rate and --precision are not given, nor set in [fit] of --config, the preset's are taken:

    | preset | steps | batch size | learning rate | precision |
    |---|---|---|---|---|
    | pixelcnn-tiny | 400 | 32 | 0.006 | fp32 |
    | pixelcnn | 2,000 | 64 | 0.002 | auto |
    | pixelcnn-large | 40,000 | 128 | 0.0005 | auto |
    | razavi | 40,000 | 128 | 0.0002 | auto |
    | gpt-tiny | 400 | 32 | 0.003 | fp32 |
    | gpt | 2,000 | 64 | 0.001 | auto |
    | gpt-large | 40,000 | 128 | 0.0005 | auto |

    Args:
        store: the code store.
        out: the folder to make.
        preset: gated PixelCNNs: pixelcnn-tiny, pixelcnn, pixelcnn-large, razavi (the paper's sizes, for GPUs); transformers: gpt-tiny, gpt,
            gpt-large.
        config: a TOML file with tables [prior], [prior.LEVEL], [fit] and [fit.LEVEL] over the preset.
        level: train this level only; flags such as --steps are then of it alone. OUT is made when all have been trained.
        holdout: share of the samples kept out of training and used to evaluate, chosen by their keys.
    """
    from pipelines.train_prior import train_prior as job

    return run(common, lambda: job(store, out, preset=preset, config=config, level=level, holdout=holdout, flags=flags))


def sample(
    prior: Path, /, *, tokenizer: Path | None = None, tokenizer_module: str | None = None, out: Path, num: int | None = None, seed: int = 0,
    label: str | None = None, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, guidance: float = 1.0, candidates: int = 1,
    complete: str | None = None, rows: str | None = None, keep: float | None = None, codes: str | None = None, columns: int | None = None,
    batch_size: int = 64, device: Device = "auto", common: Common = Common(),
) -> int:  # fmt: skip
    """Draw new images: label -> top -> bottom -> pixels. Or complete images of which the upper part is given.

        vqmill sample runs/prior --tokenizer runs/tok --label each --out samples.png
        vqmill sample runs/prior --tokenizer runs/tok --complete codes.zarr --rows 0:16 --keep 0.5 --out completed.png

    Args:
        prior: the folder that train-prior wrote.
        tokenizer: the folder of the tokenizer that the prior is bound to.
        tokenizer_module: instead, package.module:factory, when your own code made the codes.
        out: the PNG to write.
        num: how many images; 64 if not given. With --label each about 64, equally many of every class and one at least: 60 of 10 classes;
            at most 256, of the first 256 classes.
        seed: of the noise; image i depends on the seed and i only.
        label: a class, by its number or its name; or "each" for every class in turn, with a column of their own if there are 32 at most.
            Any class if not given. The number of a class is taken for it, whatever classes are named.
        temperature: below 1 is likelier and less varied; 0 always takes the likeliest code.
        top_k: draw among so many of the likeliest codes only; 0 for all.
        top_p: draw among the likeliest codes that together have this probability; 1 for all.
        guidance: how strongly the label acts: 1 as trained, 2 or 3 is clearer and less varied. Needs --label; takes twice the time.
        candidates: draw each image so often, and keep the one that its label explains best. Needs --label.
        complete: a store of codes by the same tokenizer: the upper part of its rows is kept, the rest is drawn.
        rows: START:STOP, which rows --complete takes; the first 16 if not given. Either side may be left out; rows that are not there are
            refused.
        keep: with --complete, which part of each grid's height is kept; half if not given.
        codes: also write the codes as a store.
        columns: images in a row; chosen by their number and that of the classes if not given.
        batch_size: images drawn at once; changes them no more than the device rounds differently.
        device: auto takes the GPU if there is one.
    """
    from pipelines.sample import SampleOptions
    from pipelines.sample import sample as job

    return run(common, lambda: job(prior, tokenizer, out, module=tokenizer_module, options=SampleOptions(
        num=num, seed=seed, label=label, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance, candidates=candidates,
        complete=complete, rows=rows, keep=keep, codes=codes, columns=columns, batch_size=batch_size, device=device,
    )))  # fmt: skip


def score(
    prior: Path, store: str, /, *, out: Path, rows: str = ":", tokenizer: Path | None = None, tokenizer_module: str | None = None,
    num: int = 8, batch_size: int = 32, device: Device = "auto", common: Common = Common(),
) -> int:  # fmt: skip
    """Say how surprising each row of a code store is to a prior, in bits, and where in it the surprise is.

    Odd, mislabelled and broken samples cost more bits than others of their class: look at the rows of highest z. Each row is read given
    its label, rows without one as of any class. Rows that the prior was trained on look likelier than they should: which these are is
    told by their keys, from the run.json beside the prior and the store that it names.

        vqmill score runs/prior codes.zarr --out runs/scores

    Writes into OUT:

    - `scores.parquet`: for each row its number, key, label, `trained_on` (empty when it is not known), `bits` (-log2 of its probability),
      `bits_per_code`, `LEVEL/bits`, and how many standard deviations its bits lie above the mean of these rows (`z`), of these rows of
      its label (`label_z`, empty without a label and for a label's only row) and of these rows with its `trained_on` (`trained_on_z`).
    - `maps.zarr`: a Zarr v3 group with an array for each level, bits of each code, float16 [N, h, w], in the order of the table:
      `zarr.open_group("runs/scores/maps.zarr", mode="r")["top"][0:8]`.
    - `least_and_most_likely.png`: the image, decoded, beside the bits of its codes: black is 0, over red and yellow, white 16 or more.
    - `score.json`: means for each level, beside the baselines that any prior must beat, for each label, and for rows that were trained
      on and that were not; `run.json`.

    Args:
        prior: the folder that train-prior wrote.
        store: a finished code store, made by the tokenizer that the prior is bound to.
        out: the folder to make.
        rows: START:STOP, which rows; either side may be left out, and rows that are not there are refused. Means and z are of these rows.
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
