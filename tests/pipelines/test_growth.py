"""Which corpora go on where a store ends, and what is said of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.corpus.plan import FileBundle, ImageFile, InputShard, Plan, TarFile
from pipelines.growth import grows, require_same_job, stages
from vqmill.errors import UsageError
from vqmill.spec import LevelSpec, Segment, StoreSpec

STORE = Path("codes.zarr")


def tars(*counts: int, classes: Sequence[str] = ()) -> Plan:
    shards = [
        InputShard(index, f"{index}.tar", count, 99, TarFile(f"/{index}.tar")) for index, count in enumerate(counts)
    ]
    return Plan("tars", tuple(shards), tuple(classes), {}, {})


def files(count: int, classes: Sequence[str] = ("ant", "bee")) -> Plan:
    """A folder, planned as plan.py does but for bundles of 4."""
    found = [ImageFile(f"{n:03d}.png", f"{n:03d}", 0, 9) for n in range(count)]
    bundles = [tuple(found[start : start + 4]) for start in range(0, count, 4)]
    shards = [InputShard(n, f"files-{n:06d}", len(b), 9 * len(b), FileBundle("/", b)) for n, b in enumerate(bundles)]
    return Plan("folder", tuple(shards), tuple(classes), {}, {})


def spec_of(plan: Plan, segments: Sequence[Plan] = (), *, complete: bool = True) -> StoreSpec:
    return StoreSpec(
        (LevelSpec("codes", 9, (2, 2)),), 4, {"fingerprint": "f"},
        corpus={"description": plan.corpus, "num_samples": plan.num_samples, "class_names": list(plan.class_names), "skipped": {}},
        segments=tuple(Segment(part.digest, 0, 0, len(part.shards), part.num_samples) for part in (*segments, plan)),
        complete=complete, codec="zstd",
    )  # fmt: skip


def test_a_new_store_and_the_same_corpus_are_one_stage() -> None:
    for plan in (tars(3, 4), files(6)):
        assert stages(None, plan) == [plan]
        for complete in (True, False):
            found = spec_of(plan, complete=complete)
            assert stages(found, plan) == [plan]
            assert not grows(found, plan)
            require_same_job(STORE, found, spec_of(plan), plan)


@pytest.mark.parametrize("complete", [True, False])
def test_longer_tars_are_appended(complete: bool) -> None:
    found, plan = spec_of(tars(3, 4), complete=complete), tars(3, 4, 5)
    assert stages(found, plan) == [plan]
    assert grows(found, plan)
    same = require_same_job(STORE, found, replace(spec_of(plan), codec=None), plan)
    assert (same.segments, same.corpus, same.codec) == (found.segments, found.corpus, None)


def test_a_longer_folder_is_cut_where_the_segments_end() -> None:
    first, plan = files(6), files(15)
    [cut] = stages(spec_of(first), plan)
    assert [shard.num_samples for shard in cut.shards] == [4, 2, 2, 4, 3]
    assert grows(spec_of(first), cut)
    second = files(9).cut_at([6])
    [cut] = stages(spec_of(second, [first]), plan)
    assert [shard.num_samples for shard in cut.shards] == [4, 2, 2, 1, 3, 3]
    assert grows(spec_of(second, [first]), cut)


def test_an_unfinished_store_that_ends_inside_a_bundle_is_finished_first() -> None:
    first, plan = files(6), files(15, ["ant", "bee", "cow"])
    parts = stages(spec_of(first, complete=False), plan)
    assert [[shard.num_samples for shard in part.shards] for part in parts] == [[4, 2], [4, 2, 2, 4, 3]]
    assert parts[0].digest == first.digest
    require_same_job(STORE, spec_of(first), spec_of(parts[0]), parts[0])
    assert not grows(spec_of(first), parts[0])
    assert len(stages(spec_of(files(8), complete=False), plan)) == 1, "no bundle is cut"
    assert len(stages(spec_of(tars(6), complete=False), plan)) == 1, "another corpus: refused later"


@pytest.mark.parametrize(
    ("found", "plan", "message"),
    [
        (tars(3, 4, 5), tars(3, 4), "has more than this corpus: 12 samples, here are 7"),
        (tars(3, 4), tars(3, 5, 9), "begins with the same 7 samples in the same order.*joined with: vqmill merge"),
        (files(6), files(15, ["ant", "cow"]), "Label 1 means 'bee' there"),
        (files(6), files(6, ["ant"]), "Label 1 means 'bee' there"),
    ],
)
def test_other_corpora_are_refused(found: Plan, plan: Plan, message: str) -> None:
    [cut] = stages(spec_of(found), plan)
    assert not grows(spec_of(found), cut)
    with pytest.raises(UsageError, match=r"(?s)exists with other settings:.*there .*, now .*" + message):
        require_same_job(STORE, spec_of(found), spec_of(cut), cut)


def test_a_longer_corpus_does_not_hide_other_settings() -> None:
    plan = tars(3, 4, 5)
    with pytest.raises(UsageError) as caught:
        require_same_job(STORE, spec_of(tars(3, 4)), replace(spec_of(plan), rows_per_shard=8), plan)
    assert "rows_per_shard: there 4, now 8" in str(caught.value)
    assert "plan" not in str(caught.value)


def test_a_store_that_a_prior_drew_is_another() -> None:
    drawn = replace(spec_of(tars(3)), corpus={"sampled": {}}, segments=(Segment("sampled from f", 0, 0, 1, 3),))
    with pytest.raises(UsageError, match=r"(?s)corpus\.sampled.*Choose another --out"):
        require_same_job(STORE, drawn, spec_of(tars(3, 4)), tars(3, 4))
