"""The command line: what people type, checked and handed on. `vqmill COMMAND --help` teaches each command."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pipelines.app import app, run
from pipelines.cli_priors import sample, score, train_prior
from pipelines.cli_stores import merge, repair, slice_store, verify
from pipelines.interrupts import stop
from pipelines.memory import keep_freed_memory
from pipelines.options import (
    ClusterFlags,
    Codec,
    Common,
    CorpusFlags,
    Device,
    FitFlags,
    ImageFlags,
    Layout,
    PixelRange,
    Precision,
)

__all__ = ["app", "main"]


@app.command
def train_tokenizer(
    corpus: str, /, *, out: Path, preset: str = "rgb32", config: Path | None = None, size: int | None = None,
    holdout: float = 0.05, reading: CorpusFlags = CorpusFlags(), images: ImageFlags = ImageFlags(), flags: FitFlags = FitFlags(), common: Common = Common(),
) -> int:  # fmt: skip
    """Train a VQ-VAE or VQ-VAE-2 on a corpus.

    Writes OUT/tokenizer.safetensors, metrics.jsonl, reconstructions.png, run.json. Stopped runs go on when the same command is given.

    Where --steps, --batch-size, --learning-rate and --precision are not given, nor set in [fit] of --config, the preset's are taken:

    | preset | steps | batch size | learning rate | precision |
    |---|---|---|---|---|
    | grey28 | 2,000 | 64 | 0.002 | fp32 |
    | rgb32 | 3,000 | 64 | 0.002 | fp32 |
    | rgb256 | 20,000 | 32 | 0.001 | fp32 |
    | fsq32 | 3,000 | 64 | 0.002 | fp32 |
    | dalle64 | 5,000 | 32 | 0.001 | fp32 |
    | nngen_mnist | 28,125 | 64 | 0.001 | fp32 |
    | zalando_cifar | 15,000 | 256 | 0.001 | fp32 |
    | sonnet_cifar | 10,000 | 32 | 0.0003 | fp32 |
    | unixpickle_256 | 100,000 | 16 | 0.001 | fp32 |

    Args:
        corpus: a folder of images, or quoted tar shards, here or in a bucket (s3://bucket/photos/), or torchvision:NAME?root=DIR.
        out: the folder to make.
        preset: ours: grey28 (one level, 7x7 codes), rgb32 or rgb256 (two levels: top and bottom), fsq32 (no codebook to learn), dalle64;
            published ones: nngen_mnist, zalando_cifar, sonnet_cifar, unixpickle_256. docs/tokenizers.md describes each.
        config: a TOML file with tables [tokenizer] and [fit] over the preset.
        size: side of the training images in pixels, if not the preset's.
        holdout: share of the samples kept out of training and used to evaluate, chosen by their keys.
    """
    from pipelines.train_tokenizer import train_tokenizer as job

    return run(common, lambda: job(
        corpus, out, preset=preset, config=config, size=size, holdout=holdout, flags=flags, images=images, gzip_tars=reading.gzip_tars,
    ))  # fmt: skip


@app.command
def evaluate(
    *places: str, tokenizer_module: str | None = None, out: Path | None = None, size: int | None = None, holdout: float | None = None,
    everything: Annotated[bool, Parameter(name="--all", negative="")] = False, limit: int | None = None, batch_size: int = 32,
    by_label: Annotated[bool, Parameter(negative="")] = False, precision: Precision = "fp32", device: Device = "auto",
    lpips: Path | None = None, lpips_backbone: Path | None = None, rfid: Path | None = None, reading: CorpusFlags = CorpusFlags(), images: ImageFlags = ImageFlags(), common: Common = Common(),
) -> int:  # fmt: skip
    """Measure what a tokenizer keeps of images: PSNR, SSIM, normalised error, and how it uses its codes.

    Every image goes through its codes and back. On the corpus that the tokenizer was trained on, only what training held out is looked
    at, else all images; the output says which.

        vqmill evaluate runs/tok photos/ --out runs/tok-evaluation
        vqmill evaluate photos/ --tokenizer-module my_models.vqgan:make

    Args:
        places: the folder that train-tokenizer or import-checkpoint wrote, and the corpus: a folder of images, or quoted tar shards, here or
            in a bucket (s3://bucket/photos/), or torchvision:NAME?root=DIR. With --tokenizer-module the corpus alone.
        tokenizer_module: package.module:factory, your own code, as for tokenize.
        out: a folder to make: evaluation.json, worst_and_best.png (original, reconstruction and error), quarantine.parquet, run.json.
        size: side in pixels of the squares that images are made into; the tokenizer's training size if not given.
        holdout: look at this share of the samples, chosen by their keys as in training.
        everything: look at all images.
        limit: look at this many images at most.
        batch_size: images at once; changes the figures no more than the device rounds differently.
        by_label: also give PSNR, SSIM and error for each class.
        precision: bf16 encodes as tokenize --precision bf16 does; images are decoded in fp32 either way.
        device: auto takes the GPU if there is one.
        lpips: also measure LPIPS, with weights/v0.1/alex.pth or vgg.pth of the package lpips. Nothing is downloaded.
        lpips_backbone: torchvision's weights of that AlexNet or VGG16; those in torch's cache if not given.
        rfid: also measure rFID, with pt_inception-2015-12-05-6726825d.pth of pytorch-fid. Takes 2,048 images or more.
    """
    from pipelines.evaluate import EvaluateOptions
    from pipelines.evaluate import evaluate as job

    return run(common, lambda: job(places, out, EvaluateOptions(
        size=size, holdout=holdout, everything=everything, limit=limit, batch_size=batch_size, device=device, precision=precision,
        by_label=by_label, images=images, gzip_tars=reading.gzip_tars, lpips=lpips, lpips_backbone=lpips_backbone, rfid=rfid,
    ), module=tokenizer_module))  # fmt: skip


@app.command
def tokenize(
    corpus: str, /, *, tokenizer: Path | None = None, tokenizer_module: str | None = None, out: str, size: int | None = None, workers: int | None = None, batch_size: int = 32,
    shard_rows: int | None = None, codec: Codec = "auto", precision: Precision = "fp32", compiled: Annotated[bool, Parameter(name="--compile", negative="")] = False,
    device: Device = "auto", limit: int | None = None, retry_quarantined: Annotated[bool, Parameter(negative="")] = False, reading: CorpusFlags = CorpusFlags(),
    images: ImageFlags = ImageFlags(), sample_timeout: int = 60, cluster: ClusterFlags = ClusterFlags(),
    dry_run: Annotated[bool, Parameter(negative="")] = False, common: Common = Common(),
) -> int:  # fmt: skip
    """Send a corpus through a tokenizer into a code store.

    Any number of workers gives the same bytes. Stopped jobs, killed ones too, go on when the same command is given. A corpus that has
    grown is appended: give the command again, with the new tars or files sorted behind the old ones.

    Args:
        corpus: a folder of images, or quoted tar shards, here or in a bucket (s3://bucket/photos/), or torchvision:NAME?root=DIR.
        tokenizer: the folder that train-tokenizer or import-checkpoint wrote.
        tokenizer_module: instead, package.module:factory, your own code: installed, or found from the current directory. It makes an object
            with the methods that docs/tokenizer-protocol.md describes; try it with check-tokenizer.
        out: the store to make, for example codes.zarr, or s3://bucket/codes.zarr (gs, az; docs/object-stores.md).
        size: side in pixels of the squares that images are made into; the tokenizer's training size if not given.
        workers: encoder processes; if not given, as many as this machine, or the cluster, has room for: one for each core, or GPU. More than
            that are refused here; on a cluster they wait until it has grown.
        batch_size: images encoded at once.
        shard_rows: rows of a Zarr shard, the unit of commit; 4,096 at most if not given. Raised a little when it divides badly.
        codec: how chunks are compressed; auto takes the smallest on the first Zarr shard.
        precision: bf16 is faster on GPUs and changes some codes; recorded in the store.
        compiled: torch.compile makes the tokenizer's networks: each worker takes seconds to minutes longer to start, and whether it
            is faster then depends on networks and machine. May change some codes; recorded in the store. On CPUs it takes a C++ compiler.
        device: auto takes GPUs if there are any.
        limit: take the first so many samples of the corpus only. A larger limit later, or none, appends the next ones.
        retry_quarantined: try again the samples that a finished store has set aside, for example when their files were restored. Those that
            work now become rows behind the others. Nothing else is appended: that takes the same command without this.
        sample_timeout: seconds that decoding one image may take; images that take longer, each time they are tried alone, are quarantined as
            timed_out. Recorded in the store.
        dry_run: say what would be done, and from some samples that are encoded here how long it would take and how large it would be; write nothing.
    """
    from pipelines.tokenize_command import tokenize as job

    return run(common, lambda: job(
        corpus, tokenizer, out, module=tokenizer_module, size=size, workers=workers, batch_size=batch_size, shard_rows=shard_rows, codec=codec,
        precision=precision, compiled=compiled, device=device, dry_run=dry_run, limit=limit, retry_quarantined=retry_quarantined, images=images,
        sample_timeout=sample_timeout, cluster=cluster, gzip_tars=reading.gzip_tars,
    ))  # fmt: skip


@app.command
def inspect(path: str, /, *, reading: CorpusFlags = CorpusFlags(), common: Common = Common()) -> int:
    """Say what something is: a corpus, a code store, a tokenizer, a prior, an evaluation or scores, and which command made it.

    A corpus is read and decoded whole: counts, sizes, labels, and what would be quarantined and why. Of a stopped run it says how far
    it is, and which command goes on with it.

    Args:
        path: a corpus as for tokenize, a store, or a folder that another command wrote or has begun to write.
    """
    from pipelines.inspect import inspect as job

    return run(common, lambda: job(path, gzip_tars=reading.gzip_tars))


for _command in (verify, repair, merge):
    app.command(_command)
app.command(slice_store, name="slice")


@app.command
def decode(
    store: str, /, *, out: Path, rows: str | None = None, tokenizer: Path | None = None, tokenizer_module: str | None = None, originals: str | None = None,
    columns: int | None = None, reading: CorpusFlags = CorpusFlags(), common: Common = Common(),
) -> int:  # fmt: skip
    """Turn codes back into pictures: original (if wanted) | reconstruction | codes.

    Args:
        store: the code store, a folder or an address as s3://bucket/codes.zarr.
        out: the PNG to write.
        rows: START:STOP, which rows to show; the first 16 if not given. Either side may be left out; rows that are not there are refused.
        tokenizer: the folder of the tokenizer that made the codes; the one recorded beside the store if not given.
        tokenizer_module: package.module:factory, when your own code made them; a store never imports code by itself.
        originals: the corpus that was tokenized, to show the original images beside.
        columns: images in a row of each panel.
    """
    from pipelines.decode import decode as job

    return run(common, lambda: job(
        store, out, rows=rows, tokenizer_path=tokenizer, module=tokenizer_module, originals=originals, columns=columns, gzip_tars=reading.gzip_tars,
    ))  # fmt: skip


for _command in (train_prior, sample, score):
    app.command(_command)


@app.command
def import_checkpoint(
    file: Path, /, *, layout: Layout, out: Path, size: int | None = None, pixel_range: PixelRange | None = None,
    common: Common = Common(),
) -> int:  # fmt: skip
    """Make a tokenizer of weights that another project trained.

        vqmill import-checkpoint vqvae_560.pt --layout rosinality --out runs/imported

    Widths, codebook, levels and residual blocks are read off the tensors; codes keep their numbers. Nothing in the file is run: one that
    holds more than tensors is refused. Writes OUT/tokenizer.safetensors and run.json.

    Args:
        file: the .pt file: a state dict, or a checkpoint that holds one as state_dict, model_state_dict or model.
        layout: zalando (pytorch-vq-vae), unixpickle (vq-vae-2) or rosinality (vq-vae-2-pytorch).
        out: the folder to make.
        size: side of its training images in pixels; 32 for zalando, 256 for the others if not given.
        pixel_range: how its training saw black and white: signed (-1, 1), half (-0.5, 0.5) or unit (0, 1). If not given, half for
            zalando (its earlier notebook: signed), unit for unixpickle, signed for rosinality.
    """
    from pipelines.import_command import import_checkpoint as job

    return run(common, lambda: job(file, out, layout=layout, size=size, pixel_range=pixel_range))


@app.command
def check_tokenizer(module: str, /, *, common: Common = Common()) -> int:
    """Check that your own tokenizer keeps to the protocol, before --tokenizer-module is given to other commands.

        vqmill check-tokenizer my_models.vqgan:make

    The factory is called twice; a few made-up images are encoded and decoded. Exit code 1 when a check fails.

    Args:
        module: package.module:factory, installed, or found from the current directory.
    """
    from pipelines.check_tokenizer import check_tokenizer as job

    return run(common, lambda: job(module))


@app.command
def demo(*, out: Path = Path("demo"), workers: int = 2, common: Common = Common()) -> int:
    """Run the whole chain on generated images, in under two minutes.

    Args:
        out: the folder to make; an unfinished demo goes on.
        workers: encoder processes.
    """
    from pipelines.demo import demo as job

    return run(common, lambda: job(out, workers=workers))


@app.command
def doctor(*, common: Common = Common()) -> int:
    """Say what this machine has: versions, devices, Ray, disk, and what is missing."""
    from pipelines.doctor import doctor as job

    return run(common, job)


def main() -> None:
    """The console script."""
    keep_freed_memory()
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as shells have it for what runs in the background
            signal.signal(number, stop)
    sys.exit(app())


if __name__ == "__main__":
    main()
