"""Small stores to be copied; corpora with damaged samples, and what encodes them in this process."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import vqmill
from pipelines import tokenize as tokenize_module
from pipelines.assembly import ArrivedSpan, Order, SpanFacts, carry_out, extend, mend
from pipelines.cli import app
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import Plan
from pipelines.encoder import SpanEncoder
from pipelines.foreign import packed
from pipelines.tokenize import TokenizeOptions
from pipelines.watch import Worker
from vqmill.commits import Cursor
from vqmill.writer import StoreWriter


def renamed(stores: Any, prefix: str, rows_of_a_sample: int) -> Any:
    """A builder whose sample keys begin otherwise, and whose samples may have several rows, as clips of a video have."""

    class Renamed(type(stores)):
        @staticmethod
        def samples(labels: list[int | None], first: int = 0) -> pa.Table:
            rows = stores.samples(labels, first).to_pylist()
            for row in rows:
                row["index"] //= rows_of_a_sample
                row["key"] = f"{prefix}-{row['index']}"
            return pa.Table.from_pylist(rows, schema=stores.samples([]).schema)

    return Renamed()


@pytest.fixture(scope="session")
def make_store(stores: Any) -> Callable[..., Path]:
    """Makes a finished store with labels 0, 1, 2, none, 0, 1, ... and one quarantined sample for each Zarr shard."""

    def make(
        path: Path, num_rows: int, *, spec: Any = None, seed: int = 0, prefix: str | None = None, unlabelled: bool = False,
        rows_of_a_sample: int = 1,
    ) -> Path:  # fmt: skip
        spec = spec or stores.two_levels
        labels = [None if unlabelled or row % 4 == 3 else row % 4 for row in range(num_rows)]
        builder = renamed(stores, prefix or path.stem, rows_of_a_sample)
        return builder.write(path, spec, stores.codes(spec, num_rows, seed), labels)

    return make


@pytest.fixture
def pair(make_store: Callable[..., Path], tmp_path: Path, no_fsync: None) -> tuple[Path, Path]:
    """Two stores of 21 and 30 rows in Zarr shards of 8, with different keys."""
    return make_store(tmp_path / "a.zarr", 21, seed=1), make_store(tmp_path / "b.zarr", 30, seed=2)


class Here:
    """Writes in this process, at once."""

    def submit(self, order: Order, payloads: list[Any]) -> Any:
        return carry_out(order, *payloads)

    def ready(self, handle: Any) -> bool:
        return True

    def collect(self, handle: Any) -> Any:
        return handle


def run_here(
    plan: Plan, model: Any, writer: StoreWriter, missing: list[int], options: TokenizeOptions, progress: Any, note: Any
) -> list[Worker]:
    """As the driver does, without its actors: most tests need no processes."""
    encoder = SpanEncoder(
        packed(model), Preprocessing(size=options.size, channels=model.channels), options.encoding, options.device
    )

    def between(start: Cursor, stop: Cursor) -> Iterator[ArrivedSpan]:
        for unit in range(start.input_shard, stop.input_shard + bool(stop.span or stop.row)):
            first = start.span if unit == start.input_shard else 0
            last = stop.span + bool(stop.row) if unit == stop.input_shard else None
            for span in encoder.spans(plan.shards[unit], first, last):
                yield ArrivedSpan(unit, SpanFacts(span.index, span.samples.num_rows, span.counts), span)

    mend(writer, missing, between, Here())
    extend(writer, between(writer.cursor, Cursor(len(plan.shards))), len(plan.shards), Here())
    return []


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, no_fsync: None) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(tokenize_module, "_run", run_here)
    monkeypatch.setattr(tokenize_module, "ray_cluster", lambda workers, device: nullcontext())


class Corpus:
    """Tars in a folder, and the store that is made of them in Zarr shards of 8 rows."""

    BAD = (0, 3, 6, 9, 12, 15, 18, 19)  # of each tar's 20 samples

    @staticmethod
    def png(number: int) -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    @staticmethod
    def write_tar(folder: Path, number: int, bad: Sequence[int]) -> None:
        """A tar of 20 samples, those in `bad` damaged; it has the same size whichever they are."""
        with tarfile.open(folder / f"{number}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(20):
                data = Corpus.png(20 * number + index)
                for extension, content in (
                    ("png", b"\0" * len(data) if index in bad else data),
                    ("cls", str(index % 4).encode()),
                ):
                    member = tarfile.TarInfo(f"{number}-{index:02d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer, self.out = folder / "tars", tokenizer, folder / "codes.zarr"
        self.folder.mkdir()

    def write(self, *bad: Sequence[int]) -> None:
        for number, indices in enumerate(bad):
            self.write_tar(self.folder, number, indices)

    def words(self, *more: str | Path | int) -> list[str]:
        words = ("tokenize", self.folder, "--tokenizer", self.tokenizer, "--out", self.out, "--shard-rows", 8)
        return [str(word) for word in (*words, *more)]

    def run(self, *more: str | Path | int) -> int:
        return app(self.words(*more))

    def retry(self, *more: str | Path | int) -> int:
        return self.run("--retry-quarantined", *more)

    @property
    def codes(self) -> vqmill.Codes:
        return vqmill.open_codes(self.out)

    def rows(self) -> list[str]:
        return self.codes.samples()["key"].to_pylist()

    def bad(self) -> list[str]:
        return self.codes.quarantine()["key"].to_pylist()

    @staticmethod
    def tree(store: Path) -> dict[str, bytes]:
        """The content of every file of a store, by its name."""
        return {
            path.relative_to(store).as_posix(): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()
        }


@pytest.fixture
def empty_corpus(tmp_path: Path, tokenizer_folder: Path, in_this_process: None) -> Corpus:
    """A corpus without tars, and without a store."""
    return Corpus(tmp_path, tokenizer_folder)


@pytest.fixture
def corpus(empty_corpus: Corpus) -> Corpus:
    """Two tars of 20 samples; 16 of the 40 are bad, so that the store has 24 rows in three full Zarr shards."""
    empty_corpus.write(Corpus.BAD, Corpus.BAD)
    assert empty_corpus.run() == 3
    return empty_corpus
