"""The real corpora, hostile files among them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pipelines.corpus import (
    BadImage,
    CorpusError,
    Plan,
    Preprocessing,
    Reason,
    list_samples,
    plan_corpus,
    prepare,
    read_samples,
)

pytestmark = pytest.mark.realdata


def outcomes(plan: Plan, size: int = 16, every: int = 1) -> Counter[str]:
    """Decodes every n-th sample; counts reasons, and `good`."""
    counts: Counter[str] = Counter()
    samples = [sample for shard in plan.shards for sample in read_samples(shard)]
    assert len(samples) == plan.num_samples
    for sample in samples[::every]:
        if sample.problem is not None:
            counts[sample.problem.reason] += 1
            continue
        assert sample.image is not None
        try:
            assert prepare(sample.image, Preprocessing(size)).pixels.shape == (3, size, size)
            counts["good"] += 1
        except BadImage as bad:
            counts[bad.reason] += 1
    return counts


def test_hostile_images_decode_or_say_why(real_data: Path) -> None:
    plan = plan_corpus(str(real_data / "hostile" / "images"))
    assert plan.num_samples == 76
    manifest = json.loads((real_data / "hostile" / "manifest.json").read_text())
    reasons = {}
    for sample in read_samples(plan.shards[0]):
        assert isinstance(sample.image, bytes)
        try:
            decoded = prepare(sample.image, Preprocessing(32))
        except BadImage as bad:
            reasons[sample.source] = bad.reason
        else:
            facts = manifest[f"images/{sample.source}"]["pillow"]
            turned = (facts["exif_orientation"] or 1) >= 5
            assert [decoded.width, decoded.height] == (facts["size"][::-1] if turned else facts["size"])
    undecodable = {
        name.removeprefix("images/")
        for name, facts in manifest.items()
        if name.startswith("images/") and not facts["pillow"]["ok"]
    }
    assert reasons.keys() == undecodable
    expected = {
        "derived_zero_bytes.jpg": Reason.EMPTY,
        "derived_text.png": Reason.NOT_AN_IMAGE,
        "small_jxl.jxl": Reason.UNSUPPORTED_FORMAT,
        "decompression_bomb.gif": Reason.TOO_MANY_PIXELS,
        "l2rgb_read.bmp": Reason.TOO_MANY_PIXELS,
        "derived_half.jpg": Reason.TRUNCATED,
        "truncated_jpeg.jpg": Reason.TRUNCATED,
        "truncated_end_chunk.png": Reason.TRUNCATED,
        "avif_imir-before-clap.avif": Reason.DECODE_ERROR,
    }
    assert {name: reasons[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("dotted_and_nested_keys", {"good": 4}),
        ("duplicate_keys", {Reason.DUPLICATE_KEY: 4}),
        ("missing_image", {"good": 8, Reason.MISSING_IMAGE: 4}),
        ("mixed_good_and_bad", {"good": 12}),
        ("truncated", {"good": 8, Reason.TRUNCATED: 1}),
        ("upper_ext", {"good": 4}),
        ("zero_bytes", {Reason.TRUNCATED: 1}),
    ],
)
def test_hostile_tars(real_data: Path, name: str, counts: dict[str, int]) -> None:
    found = outcomes(plan_corpus(str(real_data / "hostile" / "tars" / f"{name}.tar")))
    assert {key: found[key] for key in counts} == counts
    if name == "mixed_good_and_bad":
        assert found.total() == 15
    else:
        assert found.total() == sum(counts.values())


def test_a_tar_without_members_is_no_corpus(real_data: Path) -> None:
    with pytest.raises(CorpusError, match="no sample in it"):
        plan_corpus(str(real_data / "hostile" / "tars" / "empty.tar"))


@pytest.mark.parametrize(
    ("corpus", "num_samples", "num_labels", "every"),
    [
        ("{data}/imagenet-wds/{{000000..000009}}.tar", 480, 480, 8),
        ("{data}/cifar10-wds/train-*.tar", 10_000, 10, 50),
        ("{data}/cifar10-wds", 11_000, 10, 50),
        ("torchvision:FashionMNIST?root={data}/fashion-mnist", 60_000, 10, 100),
        ("torchvision:FashionMNIST?root={data}/fashion-mnist&split=all", 70_000, 10, 100),
        ("{data}/nlvr-captions-wds/000000.tar", 300, 1, 10),
    ],
)
def test_good_corpora_are_good(real_data: Path, corpus: str, num_samples: int, num_labels: int, every: int) -> None:
    plan = plan_corpus(corpus.format(data=real_data))
    assert plan.num_samples == num_samples
    assert outcomes(plan, every=every).keys() == {"good"}
    assert len({sample.label for shard in plan.shards for sample in read_samples(shard)}) == num_labels
    if "torchvision" in corpus:
        assert plan.class_names[9] == "Ankle boot"
        keys = {ref.key for shard in plan.shards for ref in list_samples(shard)}
        assert len(keys) == num_samples
    if "nlvr" in corpus:
        assert all(sample.caption and sample.label is None for shard in plan.shards for sample in read_samples(shard))


def test_videos_are_counted_not_forgotten(real_data: Path) -> None:
    with pytest.raises(CorpusError, match=r"21 x video: \.mp4"):
        plan_corpus(str(real_data / "videos"))
    assert outcomes(plan_corpus(str(real_data / "videos-wds" / "000000.tar"))) == {Reason.MISSING_IMAGE: 9}
    hostile = plan_corpus(str(real_data / "hostile"))
    assert (hostile.num_samples, sum(hostile.skipped.values())) == (76, 101 - 76 + 1)  # manifest.json
