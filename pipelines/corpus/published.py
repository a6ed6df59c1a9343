"""The corpus form `torchvision:NAME?root=PATH&split=…`: published archives read in place; nothing is downloaded or written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pipelines.corpus.idx import read_idx_shape
from pipelines.corpus.problems import CorpusError
from vqmill.settings import did_you_mean

PREFIX = "torchvision:"
SUPPORTED = ("MNIST", "FashionMNIST", "KMNIST")
SPLITS: Mapping[str, tuple[tuple[str, str], ...]] = {  # option -> (prefix of keys, prefix of file names)
    "train": (("train", "train"),),
    "test": (("test", "t10k"),),
    "all": (("train", "train"), ("test", "t10k")),
}
_FORM = f"{PREFIX}NAME?root=PATH&split=train|test|all"


@dataclass(frozen=True, slots=True)
class IdxFiles:
    """Images and labels of one split.

    Attributes:
        split: `train` or `test`.
        images, labels: absolute paths.
        num_samples: rows in both.
        shape: (H, W).
    """

    split: str
    images: str
    labels: str
    num_samples: int
    shape: tuple[int, int]


def find_published(corpus: str) -> tuple[list[IdxFiles], tuple[str, ...]]:
    """The files that a `torchvision:` corpus names, checked, and the names of its classes.

    Args:
        corpus: `torchvision:NAME?root=PATH&split=train|test|all`; `%26` in the path stands for `&`.

    Raises:
        CorpusError: an unknown name or option, a missing file, or one that is not the published one.
    """
    name, root, split = _parse(corpus)
    # Loading torchvision takes seconds, and only here is it needed: for its table of checksums and class names.
    from torchvision import datasets

    dataset: type[datasets.MNIST] = getattr(datasets, name)
    folder = Path(root).absolute() / name / "raw"
    if not folder.is_dir():
        raise CorpusError(
            f"{corpus}: there is no folder {folder}. `root` is the folder that holds {name}/raw/; "
            f"to fetch it: python -c \"import torchvision; torchvision.datasets.{name}('{root}', download=True)\""
        )
    checksums = dict(dataset.resources)
    found = []
    for key_prefix, file_prefix in SPLITS[split]:
        images = _find(folder, f"{file_prefix}-images-idx3-ubyte.gz", checksums)
        labels = _find(folder, f"{file_prefix}-labels-idx1-ubyte.gz", checksums)
        (count, height, width), (num_labels,) = read_idx_shape(images, 3), read_idx_shape(labels, 1)
        if count != num_labels:
            raise CorpusError(
                f"{folder}: {count} images but {num_labels} labels in {file_prefix}-*. Download the files again."
            )
        found.append(IdxFiles(key_prefix, images, labels, count, (height, width)))
    return found, tuple(dataset.classes)


def _parse(corpus: str) -> tuple[str, str, str]:
    name, _, query = corpus.removeprefix(PREFIX).partition("?")
    if name not in SUPPORTED:
        raise CorpusError(
            f"{corpus}: {name or 'no name'!r} is not read in place. Of torchvision's datasets these are: {', '.join(SUPPORTED)} "
            "(others keep their images in pickles, which could run code, or unpack to plain folders). "
            "Export its images to a folder or to tar shards, and give that as the corpus."
        )
    options = {"split": "train"}
    for pair in filter(None, query.split("&")):
        option, equals, value = pair.partition("=")
        if option not in ("root", "split") or not equals:
            raise CorpusError(
                f"{corpus}: unknown option {pair!r}.{did_you_mean(option, ('root', 'split'))} The form is {_FORM}"
            )
        options[option] = unquote(value)
    if not options.get("root"):
        raise CorpusError(f"{corpus}: root= is missing: the folder that holds {name}/raw/. The form is {_FORM}")
    if options["split"] not in SPLITS:
        raise CorpusError(f"{corpus}: split must be one of {', '.join(SPLITS)}, not {options['split']!r}.")
    return name, options["root"], options["split"]


def _find(folder: Path, packed: str, checksums: Mapping[str, str]) -> str:
    """The published .gz, held against its MD5, or else the same file unpacked."""
    path = folder / packed
    if path.is_file():
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != checksums[packed]:
            raise CorpusError(f"{path}: MD5 {md5}, but the published file has {checksums[packed]}. Download it again.")
        return str(path)
    plain = folder / packed.removesuffix(".gz")
    if plain.is_file():
        return str(plain)
    raise CorpusError(f"{folder}: neither {packed} nor {plain.name} is there. Download the dataset again.")
