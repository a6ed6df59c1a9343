"""The command `evaluate`: which images it looks at, that its figures are theirs, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import tokenizer
from pipelines.cli import app
from pipelines.corpus.holdout import choose_holdout, in_holdout
from pipelines.corpus.images import Preprocessing
from pipelines.corpus.plan import plan_corpus
from pipelines.corpus.problems import Problem
from pipelines.corpus.walk import holdout_batches, walk_images
from pipelines.gallery import SHOWN, Gallery, error_maps
from tokenizer.evaluation import Measured
from tokenizer.frechet import Moments, frechet_distance, load_inception
from tokenizer.lpips import load_lpips

RGB16 = Preprocessing(size=16, channels=3)


def run(*words: str | Path) -> int:
    try:
        return app([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def trained(tokenizer_folder: Path, scenes: str, tmp_path: Path) -> Path:
    """A tokenizer with the record of a training on `scenes` that held out a fifth."""
    folder = tmp_path / "tok"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "settings.json").write_text(json.dumps({"plan": plan_corpus(scenes).digest, "holdout": 0.2}))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images in two classes, two files that do not decode, and a text."""
    root = tmp_path / "photos"
    for index in range(12):
        path = root / ("cat", "dog")[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 20 * index + 1, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (root / "dog" / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("not an image")
    return root


def test_by_default_it_looks_at_what_training_held_out(
    trained: Path, scenes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", trained, scenes, "--json") == 0
    printed = capsys.readouterr().out
    assert "the hold-out of 0.2 that training left out" in printed
    assert "mean squared error over the variance" in printed
    found = json.loads(printed.splitlines()[-1])
    plan = plan_corpus(scenes)
    images = torch.cat([batch["images"] for batch in holdout_batches(plan, RGB16, 0.2, 64)])
    assert found["images"] == found["seen"] == len(images)
    expected = tokenizer.evaluate(tokenizer.load(trained), [images])
    assert {"nmse", "psnr", "psnr_per_image", "ssim", "l1", "top/entropy_bits", "bottom/used_codes"} <= expected.keys()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "images", "said"),
    [
        (("--all",), 300, "looked at: all images, most of which it was trained on"),
        (("--all", "--limit", "7"), 7, "looked at: the first 7 of all images, most of which it was trained on"),
        (("--limit", "7"), 7, "looked at: the first 7 of the hold-out of 0.2 that training left out"),
        (("--all", "--limit", "301"), 300, "looked at: all images, most of which it was trained on"),
        (("--holdout", "0.1"), None, "none of which it was trained on"),
        (("--holdout", "0.5"), None, "more than the 0.2 that training left out"),
    ],
    ids=["all", "limit", "limit of the hold-out", "limit beyond the end", "less", "more"],
)
def test_the_user_may_choose(
    trained: Path,
    scenes: str,
    words: tuple[str, ...],
    images: int | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if images is None:
        fraction = float(words[1])
        images = sum(
            in_holdout(image.name.split()[-1], fraction) for image in walk_images(plan_corpus(scenes), RGB16, None, {})
        )
        assert 10 < images < 200
    assert run("evaluate", trained, scenes, *words, "--json") == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert json.loads(printed.splitlines()[-1])["images"] == images


def test_of_another_corpus_it_looks_at_all_images(
    trained: Path, tokenizer_folder: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", trained, photos) == 3
    printed = capsys.readouterr().out
    assert "12 images of 16x16" in printed
    assert "the corpus is not as it was trained on" in printed
    assert "--holdout 0.2" in printed
    assert "empty: dog/empty" in printed
    assert run("evaluate", tokenizer_folder, photos) == 3
    assert "what it was trained on is not known" in capsys.readouterr().out
    (trained / "settings.json").write_text('{"command": "import-checkpoint", "layout": "zalando"}')
    assert run("evaluate", trained, photos) == 3
    assert "what it was trained on is not known" in capsys.readouterr().out


def test_out_holds_figures_pictures_and_what_was_left_out(
    tokenizer_folder: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    command = ("evaluate", tokenizer_folder, photos, "--out", out, "--by-label", "--json")
    assert run(*command) == 3
    first = last_json(capsys)
    assert (first["seen"], first["encoded"], first["quarantined"], first["skipped"]) == (15, 12, 2, 1)
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation.json", "quarantine.parquet", "run.json", "settings.json", "worst_and_best.png",
    ]  # fmt: skip
    record = json.loads((out / "evaluation.json").read_bytes())
    assert record["figures"]["psnr"] == first["psnr"]
    assert [(entry["name"], entry["images"]) for entry in record["classes"]] == [("cat", 6), ("dog", 6)]
    mean = sum(entry["psnr_per_image"] for entry in record["classes"]) / 2
    assert mean == pytest.approx(record["figures"]["psnr_per_image"])
    order = [entry["psnr"] for entry in (*record["worst"], *reversed(record["best"]))]
    assert order == sorted(order)
    assert len({entry["name"] for entry in (*record["worst"], *record["best"])}) == 12
    listed = pq.read_table(out / "quarantine.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in listed} == {"cat/broken": "truncated", "dog/empty": "empty"}
    with Image.open(out / "worst_and_best.png") as picture:
        assert picture.width > 6 * 2 * 64
        assert json.loads(picture.info["vqmill"])["by_label"] is True
    assert run(*command) == 3
    printed = capsys.readouterr().out
    assert "already evaluated" in printed
    again = json.loads(printed.splitlines()[-1])
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
    assert run("evaluate", tokenizer_folder, photos, "--out", out, "--limit", "3") == 2
    assert "limit: there null, now 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "differs"),
    [(("--size", "24"), True), (("--batch-size", "5"), False)],
    ids=["size", "batch"],
)
def test_flags_that_change_the_figures_and_those_that_do_not(
    tokenizer_folder: Path, scenes: str, words: tuple[str, ...], differs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for more in ((), words):
        assert run("evaluate", tokenizer_folder, scenes, "--limit", "40", "--json", *more) == 0
        found.append(last_json(capsys))
    assert (found[1]["psnr"] != pytest.approx(found[0]["psnr"], rel=1e-6)) == differs
    assert found[0]["classes"] == []


def test_precision_is_that_of_the_encoder(tokenizer_folder: Path, scenes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def watch(name: str) -> None:
        real = getattr(tokenizer.Tokenizer, name)

        def spy(*args: Any) -> Any:
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return real(*args)

        monkeypatch.setattr(tokenizer.Tokenizer, name, spy)

    watch("encode")
    watch("decode")
    command = ("evaluate", tokenizer_folder, scenes, "--limit", "3", "--device", "cpu", "--precision")
    assert run(*command, "bf16") == run(*command, "fp32") == 0
    assert seen == [("encode", True), ("decode", False), ("encode", False), ("decode", False)]


def test_images_smaller_than_the_window_say_so(
    tokenizer_folder: Path, scenes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", tokenizer_folder, scenes, "--size", "8", "--limit", "5", "--by-label") == 0
    printed = capsys.readouterr().out
    assert "its window is larger than the images" in printed
    assert "SSIM" not in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--holdout", "0.1", "--all"), "one of them at most"),
        (("--holdout", "1"), "between 0 and 1"),
        (("--limit", "0"), "--limit must be at least 1"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--size", "20"), "multiple of 8"),
        (("--out", "INSIDE"), "lies inside the corpus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused(
    trained: Path, photos: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tuple(str(photos / "out") if word == "INSIDE" else word for word in words)
    assert run("evaluate", trained, photos, *words) == 2
    assert message in capsys.readouterr().err


def test_the_own_folder_of_the_tokenizer_is_no_out(
    trained: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for settings in ('{"command": "train-tokenizer", "plan": "x", "holdout": 0.2}', None):
        (trained / "settings.json").unlink() if settings is None else (trained / "settings.json").write_text(settings)
        assert run("evaluate", trained, photos, "--out", trained) == 2
        error = capsys.readouterr().err
        assert "Choose another --out." in error
        assert "remove" not in error
        assert (trained / "tokenizer.safetensors").is_file()


def test_a_damaged_record_of_the_training_is_refused(
    trained: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (
        "{",
        '{"plan": "x"}',
        '{"plan": "x", "holdout": 3}',
        '{"command": "train-tokenizer", "plan": "x"}',
        '{"command": "train-tokenizer", "plan": "x", "holdout": 3}',
    ):
        (trained / "settings.json").write_text(text)
        assert run("evaluate", trained, photos) == 2
        assert "settings.json: expected" in capsys.readouterr().err
    assert run("evaluate", tmp_path / "nowhere", photos) == 2


def test_a_corpus_of_broken_images_is_refused(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no")
    assert run("evaluate", tokenizer_folder, folder) == 2
    assert "vqmill inspect" in capsys.readouterr().err


def test_lpips_and_rfid_from_files(
    tokenizer_folder: Path, scenes: str, published_weights: Path, inception_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "no-cache"))
    out = tmp_path / "out"
    command = ("evaluate", tokenizer_folder, scenes, "--size", "32", "--limit", "6", "--batch-size", "4", "--json")
    assert run(*command) == 0
    assert not {"lpips", "rfid"} & last_json(capsys).keys(), "only when asked for"

    backbone = published_weights / "checkpoints/vgg16-397923af.pth"
    given: list[Any] = []  # the distance itself takes seconds, so its arguments are compared

    def spy(*moments: Any) -> float:
        given.extend(moments)
        return frechet_distance(*moments)

    monkeypatch.setattr("pipelines.learned.frechet_distance", spy)
    asked = ("--lpips", published_weights / "vgg.pth", "--lpips-backbone", backbone, "--rfid", inception_file)
    assert run(*command, "--out", out, *asked) == 0
    printed = capsys.readouterr().out
    assert "rFID of 6 images is biased upwards" in printed
    found = json.loads(printed.splitlines()[-1])

    images = [image.pixels for image in walk_images(plan_corpus(scenes), Preprocessing(size=32), None, {}, 6)]
    original = torch.from_numpy(np.stack(images))
    model = tokenizer.load(tokenizer_folder)
    made = model.decode(model.encode(original), torch.float32)
    distance = load_lpips(published_weights / "vgg.pth", backbone)(original / 127.5 - 1, made).mean()
    assert found["lpips"] == pytest.approx(float(distance), rel=1e-3)
    network = load_inception(inception_file)
    for (mean, covariance), pixels in zip(given, (original, model.decode(model.encode(original))), strict=True):
        moments = Moments()
        moments.add(network(pixels))
        torch.testing.assert_close(mean, moments.result()[0], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(covariance, moments.result()[1], rtol=1e-2, atol=1e-6)
    assert found["rfid"] > 0

    assert run(*command, "--out", out) == 2, "the measures are settings of the output"
    assert "rfid" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lpips", "rfid", "cache", "backbone"])
def test_weights_that_are_not_there_are_named(
    tokenizer_folder: Path, scenes: str, published_weights: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "no-cache"))
    nowhere = tmp_path / "nowhere.pth"
    words, message = {
        "lpips": (("--lpips", nowhere), "weights/v0.1/alex.pth or vgg.pth"),
        "rfid": (("--rfid", nowhere), "pt_inception-2015-12-05-6726825d.pth"),
        "cache": (
            ("--lpips", published_weights / "alex.pth"),
            "no-cache/checkpoints/alexnet-owt-7be5be79.pth: no such file",
        ),
        "backbone": (("--lpips-backbone", nowhere), "only together with --lpips"),
    }[kind]
    assert run("evaluate", tokenizer_folder, scenes, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("limit", [None, 5])
def test_the_walk_gives_what_validation_gives(photos: Path, scenes: str, limit: int | None) -> None:
    for corpus, fraction in ((str(photos), 0.6), (scenes, 0.3)):
        plan = plan_corpus(corpus)
        expected_problems: dict[str, Problem] = {}
        batches = list(holdout_batches(plan, RGB16, fraction, 8, limit, expected_problems))
        problems: dict[str, Problem] = {}
        found = list(walk_images(plan, RGB16, choose_holdout(plan, RGB16, fraction), problems, limit))
        assert np.array_equal(
            np.stack([image.pixels for image in found]), torch.cat([b["images"] for b in batches]).numpy()
        )
        assert [image.label for image in found] == torch.cat([batch["label"] for batch in batches]).tolist()
        assert problems == expected_problems


def measured(psnr: list[float]) -> Measured:
    images = torch.linspace(-1, 1, len(psnr)).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    figures = torch.tensor(psnr, dtype=torch.float64)
    return Measured(images, torch.zeros_like(images), figures, None, figures)


@pytest.mark.parametrize("number", [1, 2, 5, 2 * SHOWN, 40])
def test_the_gallery_keeps_both_ends(number: int) -> None:
    order = np.random.default_rng(0).permutation(number).astype(float).tolist()
    gallery = Gallery()
    for first in range(0, number, 7):
        part = order[first : first + 7]
        gallery.add([f"{value:g}" for value in part], measured(part))
    shown = min(number, 2 * SHOWN)
    assert [exhibit.name for exhibit in gallery.worst] == [str(place) for place in range((shown + 1) // 2)]
    assert [exhibit.name for exhibit in gallery.best] == [str(number - 1 - place) for place in range(shown // 2)]
    assert gallery.draw().height > 0


def test_error_maps_are_four_times_as_bright() -> None:
    original = np.zeros((1, 3, 1, 3), np.uint8)
    other = np.array([[[[0, 3, 200]], [[0, 3, 200]], [[0, 9, 200]]]], np.uint8)
    assert error_maps(original, other).tolist() == [[[[0, 20, 255]]]]
