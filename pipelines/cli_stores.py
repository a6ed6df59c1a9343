"""The commands that keep code stores: verify, repair, merge, slice. cli.py adds them to the app."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from pipelines.app import run
from pipelines.options import Codec, Common


def verify(
    store: str, /, *, quick: Annotated[bool, Parameter(negative="")] = False, common: Common = Common()
) -> int:  # fmt: skip
    """Read every byte of a code store: checksums, code ranges, rows, commits.

    Each problem is named with its place (level, Zarr shard, rows, input shards) and what to do. Exit code 1 when anything is wrong, or
    the store is unfinished.

    Args:
        store: the code store, a folder or an address as s3://bucket/codes.zarr.
        quick: read metadata and commit records only, and see that every file is there with its size.
    """
    from pipelines.check import verify as job

    return run(common, lambda: job(store, quick=quick))


def repair(
    store: str, /, *, dry_run: Annotated[bool, Parameter(negative="")] = False, common: Common = Common()
) -> int:  # fmt: skip
    """Mend what can be mended in a code store, and say which command does the rest.

    Verifies the store first. Leftovers are removed, metadata is written anew, a lost tail is given up, and damaged files are removed, so
    that the tokenize command that made the store makes them again. Exit code 0 when the store is whole afterwards, 1 when more is to be
    done.

    Args:
        store: the code store, a folder or an address as s3://bucket/codes.zarr.
        dry_run: say what would be done, and do nothing.
    """
    from pipelines.check import repair as job

    return run(common, lambda: job(store, dry_run=dry_run))


def merge(
    *stores: str, out: str, shard_rows: int | None = None, codec: Codec = "auto", common: Common = Common()
) -> int:
    """Make one code store of several that the same tokenizer made, without encoding anything again.

    The rows of the first store come first, then those of the second, and so on; samples and quarantine lines come along as they are.

        vqmill merge 2023.zarr 2024.zarr --out both.zarr

    Levels, tokenizer, preset, precision, preprocessing and class names must be the same: a difference is shown and refused. Stopped
    copies, killed ones too, go on when the same command is given. One store alone is cut or compressed anew:

        vqmill merge codes.zarr --out recut.zarr --shard-rows 1024 --codec blosc-lz4

    Args:
        stores: finished code stores, in the order in which their rows are wanted.
        out: the store to make.
        shard_rows: rows of a Zarr shard, the unit of commit; as in the stores if they agree, else 4,096 at most. Raised a little when it
            divides badly.
        codec: how codes are compressed; as in the stores if they agree, else auto takes the smallest on the first Zarr shard.
    """
    from pipelines.copy_command import merge as job

    return run(common, lambda: job(list(stores), out, shard_rows=shard_rows, codec=codec))


def slice_store(
    store: str, /, *, out: str, rows: str | None = None, label: Annotated[list[int] | None, Parameter(negative="")] = None,
    shard_rows: int | None = None, codec: Codec = "auto", common: Common = Common(),
) -> int:  # fmt: skip
    """Make a code store of some rows of another, without encoding anything again.

    Rows keep their order. With both filters, the rows in the range that have one of the labels are taken.

        vqmill slice codes.zarr --out first.zarr --rows 0:10000
        vqmill slice codes.zarr --out shoes.zarr --label 5 --label 7

    Quarantine lines stay behind: they are of samples without rows. Stopped copies, killed ones too, go on when the same command is given.

    Args:
        store: a finished code store.
        out: the store to make.
        rows: START:STOP, which rows to take; either side may be left out, and rows that are not there are refused.
        label: a class number whose rows to take, -1 for rows without a label; may be given several times.
        shard_rows: rows of a Zarr shard, the unit of commit; as in the store if not given. Raised a little when it divides badly.
        codec: how codes are compressed; auto takes what the store has.
    """
    from pipelines.copy_command import slice_store as job

    return run(common, lambda: job(store, out, rows=rows, labels=label, shard_rows=shard_rows, codec=codec))
