"""What a store is that is made of others: whether their codes go together, and the metadata of the result. Pure: reads no files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from pipelines.selection import Source
from vqmill.errors import UsageError
from vqmill.settings import different_settings
from vqmill.spec import CODECS, Segment, StoreSpec, default_rows_per_shard, usable_rows_per_shard

# Facts of the tokenizer's runs: they may move single codes by rounding, or set a sample aside, not what codes mean.
JOINED = ("batch_size", "computed_on", "sample_timeout_seconds")
# Of the corpus; what it says beside these is kept where all sources agree.
REWRITTEN = ("description", "num_samples", "class_names", "skipped", "copied")
BETWEEN = "; "  # joined values


def joined_spec(
    sources: Sequence[Source], description: str, *, skipped: bool, rows_per_shard: int | None, codec: str | None
) -> StoreSpec:
    """The specification of a store that holds the rows of others, one source behind the other.

    Args:
        sources: one or more.
        description: of the new store's corpus.
        skipped: whether the files that the sources' corpora left out are counted here, too.
        rows_per_shard: of the new store, or a few more when these divide badly; None for what the sources have in common, else the rule
            of all stores.
        codec: of the new store; None for what the sources have in common, else the smallest on the first Zarr shard.

    Raises:
        UsageError: the sources' codes or labels do not go together; each difference has a line.
    """
    first = sources[0].codes.spec
    for source in sources[1:]:
        refuse_other_making(sources[0], source)
    sizes = {source.codes.spec.rows_per_shard for source in sources}
    codecs = {source.codes.spec.codec or CODECS[0] for source in sources if len(source.codes)}
    if rows_per_shard is not None:
        sizes = {usable_rows_per_shard(first.levels, rows_per_shard)}
    tokenizer = {**first.tokenizer, **{name: value for name in JOINED if (value := _joined_value(sources, name))}}
    counts = [source.counts for source in sources]
    return StoreSpec(
        levels=first.levels,
        rows_per_shard=sizes.pop() if len(sizes) == 1 else default_rows_per_shard(first.levels),
        tokenizer=tokenizer,
        preprocessing=first.preprocessing,
        corpus={
            **_common_facts(sources),
            "description": description,
            "num_samples": sum(count.seen for count in counts),
            "class_names": joined_class_names(sources),
            "skipped": dict(_skipped(sources)) if skipped else {},
            "copied": [
                {"description": source.codes.spec.corpus.get("description"), "rows": len(source.rows)}
                for source in sources
            ],
        },
        segments=(
            Segment(
                hashlib.sha256("\n".join(source.digest for source in sources).encode()).hexdigest(),
                input_shards=len(sources),
                num_samples=sum(count.seen for count in counts),
            ),
        ),
        codec=codec or (codecs.pop() if len(codecs) == 1 else None),
    )


def refuse_other_making(first: Source, second: Source) -> None:
    """Refuses stores whose codes do not mean the same: other levels, tokenizer, preset, precision or preprocessing.

    Raises:
        UsageError: each difference has a line.
    """
    names = (first.codes.place.name, second.codes.place.name)
    differences = different_settings(_making(first.codes.spec), _making(second.codes.spec), names)
    if differences:
        listing = "\n".join(f"  {line}" for line in differences)
        raise UsageError(
            f"{names[0]} and {names[1]} were not made alike, so their codes do not go together:\n{listing}\n"
            "Merge stores of one tokenizer with one preprocessing, or tokenize both corpora with the same."
        )


def joined_class_names(sources: Sequence[Source]) -> list[str]:
    """The names of the classes by label; a source without names may come along when it has no labels either.

    Raises:
        UsageError: label 0 of one source would not be label 0 of another.
    """
    named = [source for source in sources if source.codes.class_names]
    if not named:
        return []
    names = named[0].codes.class_names
    for source in sources:
        other = source.codes.class_names
        if other != names and (other or source.has_labels):
            raise UsageError(
                f"{named[0].codes.place.name} and {source.codes.place.name}: labels mean other classes there:\n"
                f"{_class_difference(named[0], source)}\nTokenize both corpora as one, which gives their classes one numbering."
            )
    return list(names)


def shared_keys(sources: Sequence[Source]) -> int:
    """How many different sample keys occur in more than one source (by 64-bit hashes)."""
    if len(sources) == 1:
        return 0
    _, times = np.unique(np.concatenate([np.unique(source.keys) for source in sources]), return_counts=True)
    return int((times > 1).sum())


def _making(spec: StoreSpec) -> dict[str, Any]:
    """What stores must share for their codes to go together."""
    attributes = spec.to_attributes()
    tokenizer = {name: value for name, value in attributes["tokenizer"].items() if name not in JOINED}
    return {"levels": attributes["levels"], "tokenizer": tokenizer, "preprocessing": attributes["preprocessing"]}


def _class_difference(first: Source, second: Source) -> str:
    if not second.codes.class_names:
        return f"  class_names: {first.codes.place.name} has {len(first.codes.class_names)}, {second.codes.place.name} has labels without names"
    sides = (first.codes.place.name, second.codes.place.name)
    names = [{"class_names": source.codes.class_names} for source in (first, second)]
    return "\n".join(f"  {line}" for line in different_settings(names[0], names[1], sides))


def _joined_value(sources: Iterable[Source], name: str) -> object:
    """The value that all sources have, or their different values as one text; a source may be the result of a merge itself."""
    values = [source.codes.spec.tokenizer[name] for source in sources if name in source.codes.spec.tokenizer]
    parts = {part for value in values for part in str(value).split(BETWEEN)}
    if len(parts) <= 1:
        return values[0] if values else None
    return BETWEEN.join(sorted(parts, key=lambda part: (int(part) if part.isdecimal() else 0, part)))


def _common_facts(sources: Sequence[Source]) -> dict[str, Any]:
    """What all corpora say alike beside the usual, such as the prior that drew the codes."""
    first, *others = (source.codes.spec.corpus for source in sources)
    return {
        name: value
        for name, value in first.items()
        if name not in REWRITTEN and all(other.get(name) == value for other in others)
    }


def _skipped(sources: Iterable[Source]) -> Counter[str]:
    return sum((Counter(source.codes.spec.corpus.get("skipped", {})) for source in sources), Counter[str]())
