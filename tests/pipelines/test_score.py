"""The command `score`: its figures against direct computation, the odd row it must find, its picture, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

import priors
from pipelines.cli import app
from pipelines.prior_inputs import split_rows
from pipelines.surprise import ends, z_scores
from priors.level import inference
from priors.likelihood import level_nats
from vqmill import Codes, open_codes
from vqmill.spec import LevelSpec, Segment

FINGERPRINT = "0" * 32  # of the stores that `make_store` makes
TWO_LEVELS = (priors.LevelShape("top", 512, (2, 3)), priors.LevelShape("bottom", 200, (4, 6)))
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def run(*words: str | Path) -> int:
    try:
        return app([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)


def toy(num_classes: int = 3, levels: Any = TWO_LEVELS, fingerprint: str = FINGERPRINT, **sizes: Any) -> priors.Prior:
    torch.manual_seed(0)
    sizes = {"depth": 8, "num_layers": 1} | sizes
    return priors.from_preset("pixelcnn-tiny", levels, num_classes, fingerprint, **sizes).eval()


@pytest.fixture
def store(make_store: Any, tmp_path: Path, no_fsync: None) -> Path:
    """21 rows in Zarr shards of 8, labels 0, 1, 2, none, 0, ..."""
    return make_store(tmp_path / "codes.zarr", 21)


@pytest.fixture
def prior(tmp_path: Path) -> Path:
    priors.save(toy(), tmp_path / "prior")
    return tmp_path / "prior"


def batch_of(codes: Codes, rows: slice) -> dict[str, torch.Tensor]:
    arrays = {name: codes[name][rows] for name in codes.levels} | {"label": codes.labels[rows]}
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in arrays.items()}


@pytest.mark.parametrize("block_codes", [1 << 20, 4 * 24], ids=["one_block", "blocks_of_four"])
@pytest.mark.parametrize(("rows", "chosen"), [(None, slice(0, 21)), ("5:18", slice(5, 18))], ids=["all", "some"])
def test_figures_are_those_of_a_direct_computation(
    store: Path, prior: Path, tmp_path: Path, rows: str | None, chosen: slice, block_codes: int,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipelines.score.MAP_CHUNK_CODES", block_codes)
    out, some = tmp_path / "scores", ("--rows", rows) if rows else ()
    assert run("score", prior, store, "--out", out, *some, "--batch-size", "3", "--json") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "least_and_most_likely.png", "maps.zarr", "run.json", "score.json", "scores.parquet", "settings.json",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    codes, model = open_codes(store), priors.load(prior)
    batch = batch_of(codes, chosen)
    expected = {name: values.numpy() for name, values in priors.score(model, batch).items()}
    bits = expected["top"] + expected["bottom"]
    table = pq.read_table(out / "scores.parquet").to_pydict()
    figures = ["bits", "bits_per_code", "z", "label_z", "trained_on_z", "top/bits", "bottom/bits"]
    assert list(table) == ["row", "key", "label", "trained_on", *figures]
    assert set(table["trained_on"]) == set(table["trained_on_z"]) == {None}
    assert "which rows it was trained on is not known: nothing beside the prior says" in printed
    assert "trained on or not" not in printed
    assert table["row"] == list(range(chosen.start, chosen.stop))
    assert table["key"] == codes.sample_keys()[chosen]
    assert table["label"] == [None if row % 4 == 3 else row % 4 for row in table["row"]]
    for name in ("top", "bottom"):
        np.testing.assert_allclose(table[f"{name}/bits"], expected[name], rtol=1e-5)
    np.testing.assert_allclose(table["bits"], bits, rtol=1e-5)
    np.testing.assert_allclose(table["bits_per_code"], bits / (6 + 24), rtol=1e-5)
    np.testing.assert_allclose(table["z"], (bits - bits.mean()) / bits.std(), atol=1e-3)
    for label in range(3):
        own = np.array([found == label for found in table["label"]])
        by_hand = (bits[own] - bits[own].mean()) / bits[own].std()
        np.testing.assert_allclose(np.array(table["label_z"])[own].astype(float), by_hand, atol=1e-3)
    assert {z is None for z, label in zip(table["label_z"], table["label"], strict=True) if label is None} == {True}

    maps = zarr.open_group(out / "maps.zarr", mode="r")
    assert dict(maps.attrs) == {"unit": "bits per code", "prior": model.fingerprint, "first_row": chosen.start}
    with inference(model):
        for name, grid in (("top", (2, 3)), ("bottom", (4, 6))):
            array = maps[name]
            assert isinstance(array, zarr.Array)
            number = chosen.stop - chosen.start
            assert (array.dtype, array.metadata.zarr_format) == (np.float16, 3)
            assert array.chunks == (min(number, block_codes // 24), *grid)
            wanted = level_nats(model.level_prior(name), batch).numpy() / math.log(2)
            np.testing.assert_allclose(array[:], wanted, rtol=1e-3)

    record, facts = json.loads((out / "score.json").read_bytes()), json.loads(printed.splitlines()[-1])
    assert (facts["rows"], facts["out"], facts["bits"]) == (chosen.stop - chosen.start, str(out), record["bits"])
    for level in record["levels"]:
        array = codes[level["name"]][chosen]
        crude = priors.baselines(array, codes.spec.level(level["name"]).codebook_size)
        assert (level["uniform"], level["unigram"], level["bigram"]) == (crude.uniform, crude.unigram, crude.bigram)
        assert level["bits_per_code"] == pytest.approx(expected[level["name"]].mean() / array[0].size)
        assert (
            f"level {level['name']}: {level['bits_per_code']:.3f} bits per code (uniform {crude.uniform:.3f}" in printed
        )
    assert (record["bits"], record["bits_deviation"]) == pytest.approx((bits.mean(), bits.std()), rel=1e-4)
    for entry in record["labels"]:
        own = codes.labels[chosen] == entry["label"]
        assert (entry["rows"], entry["bits"]) == (own.sum(), pytest.approx(bits[own].mean(), rel=1e-5))
        assert entry["name"] == {0: "cat", 1: "dog"}.get(entry["label"], "")
    order = np.argsort(-bits)
    assert [entry["row"] for entry in record["least_likely"]] == (order[:8] + chosen.start).tolist()[
        : len(bits) // 2 + 1
    ]
    assert [entry["row"] for entry in record["most_likely"]] == (order[::-1][:8] + chosen.start).tolist()[
        : len(bits) // 2
    ]
    words = {0: ", label 0 (cat)", 1: ", label 1 (dog)", 2: ", label 2", -1: ""}
    for entry in record["least_likely"][:5]:
        bits = f": {entry['bits']:,.1f} bits"
        assert (
            f"row {entry['row']}: {table['key'][entry['row'] - chosen.start]}{words[entry['label']]}{bits}" in printed
        )


def test_of_fewer_codes_for_baselines_the_record_says_so(
    store: Path, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.score.BASELINE_CODES", 24 * 5)
    assert run("score", prior, store, "--out", tmp_path / "scores") == 0
    levels = json.loads((tmp_path / "scores" / "score.json").read_bytes())["levels"]
    assert [(level["name"], level["baseline_rows"]) for level in levels] == [("top", 20), ("bottom", 5)]


def test_a_row_of_random_codes_is_found_among_regular_ones(stores: Any, tmp_path: Path, no_fsync: None) -> None:
    torch.manual_seed(0)
    shape = priors.LevelShape("codes", 16, (4, 4))
    rows = np.repeat(np.arange(40) % 16, 16).reshape(40, 4, 4)  # each grid is of one code
    model = toy(0, [shape])
    step = priors.PriorStep(model, "codes").train()
    optimizer = torch.optim.Adam(step.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        step({"codes": torch.from_numpy(rows)}).loss.backward()
        optimizer.step()
    priors.save(model, tmp_path / "prior")
    odd = rows.copy()
    odd[23] = np.random.default_rng(0).integers(0, 16, (4, 4))
    odd[7, 2, 1] = (odd[7, 2, 1] + 5) % 16  # one wrong code: its place is seen in the map
    spec = replace(stores.two_levels, levels=(LevelSpec("codes", 16, (4, 4)),))
    store, out = stores.write(tmp_path / "codes.zarr", spec, {"codes": odd}), tmp_path / "scores"
    assert run("score", tmp_path / "prior", store, "--out", out) == 0
    record = json.loads((out / "score.json").read_bytes())
    assert [entry["row"] for entry in record["least_likely"][:2]] == [23, 7]
    assert record["least_likely"][0]["z"] > 4
    assert not {23, 7} & {entry["row"] for entry in record["most_likely"]}
    surprise = np.asarray(zarr.open_group(out / "maps.zarr", mode="r")["codes"][7])
    assert np.unravel_index(surprise.reshape(-1)[1:].argmax() + 1, (4, 4)) == (2, 1)
    regular = [entry["bits"] for entry in record["least_likely"][2:]]
    assert max(regular) < 16 < record["least_likely"][1]["bits"]  # a bit a code


@pytest.mark.parametrize(
    ("num_classes", "dropout", "warned"),
    [(0, 0.0, False), (2, 0.1, False), (2, 0.0, True)],
    ids=["no_classes", "any_learned", "any_never_seen"],
)
def test_a_store_without_labels(
    make_store: Any, tmp_path: Path, num_classes: int, dropout: float, warned: bool, no_fsync: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store, out = make_store(tmp_path / "codes.zarr", 6, unlabelled=True), tmp_path / "scores"
    model = toy(num_classes, **({"label_dropout": dropout} if num_classes else {}))
    priors.save(model, tmp_path / "prior")
    assert run("score", tmp_path / "prior", store, "--out", out) == 0
    text = "6 of 6 rows have no label and are read as of any class"
    assert (text in capsys.readouterr().out) == warned
    table = pq.read_table(out / "scores.parquet")
    assert table["label"].null_count == table["label_z"].null_count == 6
    expected = sum(
        priors.score(model, batch_of(open_codes(store), slice(0, 6)) | {"label": torch.full((6,), -1)}).values()
    )
    np.testing.assert_allclose(table["bits"].to_pylist(), expected, rtol=1e-5)


def test_labels_matter_and_a_label_of_one_row_has_no_z(store: Path, prior: Path, tmp_path: Path) -> None:
    assert run("score", prior, store, "--rows", "0:5", "--out", tmp_path / "scores") == 0
    table = pq.read_table(tmp_path / "scores" / "scores.parquet")
    assert [z is None for z in table["label_z"].to_pylist()] == [False, True, True, True, False]
    other = batch_of(open_codes(store), slice(0, 5)) | {"label": torch.tensor([1, 2, 0, 1, 2])}
    wrong = sum(priors.score(priors.load(prior), other).values())
    assert np.abs(np.array(table["bits"].to_pylist()) - wrong.numpy()).min() > 1e-3


REFUSED = {
    "tokenizer": (toy, {"fingerprint": "f" * 32}, (), "was given tokenizer 00000000000000000000000000000000"),
    "grid": (
        toy, {"levels": (priors.LevelShape("top", 512, (2, 2)), priors.LevelShape("bottom", 200, (4, 4)))}, (),
        "level 'top' has 2x3 codes of 512, but {prior} models 2x2 codes of 512. Tokenize at the size",
    ),
    "codebook": (
        toy, {"levels": (TWO_LEVELS[0], priors.LevelShape("bottom", 100, (4, 6)))}, (),
        "level 'bottom' has 4x6 codes of 200, but {prior} models 4x6 codes of 100.",
    ),
    "level": (
        toy, {"levels": (TWO_LEVELS[0], priors.LevelShape("middle", 200, (4, 6)))}, (),
        "has no level middle; its levels are top, bottom, but {prior} models top, middle.",
    ),
    "classes": (
        toy, {"num_classes": 2}, (),
        "row 2 has label 2, but {prior} knows the classes 0..1; so it is with 5 of 21 rows.",
    ),
    "num": (toy, {}, ("--num", "0"), "--num must lie in 1..1,024, got 0."),
    "batch_size": (toy, {}, ("--batch-size", "0"), "--batch-size must be at least 1, got 0."),
    "rows": (toy, {}, ("--rows", "20:30"), "--rows 20:30: rows 21:30 are not there; the store has rows 0:21."),
    "no_tokenizer_there": (toy, {}, ("--tokenizer", "nowhere"), "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_made(
    case: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options, words, message = REFUSED[case]
    prior = tmp_path / "prior"
    priors.save(make(**options), prior)
    monkeypatch.setattr(priors, "bits_per_code", None)  # would be called
    assert run("score", prior, store, "--out", tmp_path / "scores", *words) == 2
    assert message.format(prior=prior) in capsys.readouterr().err
    assert not list(tmp_path.glob("scores*"))


def test_rows_that_were_trained_on_are_told_apart(
    make_store: Any, stores: Any, tmp_path: Path, no_fsync: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = replace(stores.two_levels, segments=(Segment("plan", 0, 0, 5, 40),))
    store, prior, out = make_store(tmp_path / "codes.zarr", 40, spec=spec), tmp_path / "prior", tmp_path / "scores"
    flags = ("--preset", "pixelcnn-tiny", "--steps", "1", "--holdout", "0.3")
    assert run("train-prior", store, "--out", prior, *flags) == 0
    capsys.readouterr()
    assert run("score", prior, store, "--out", out) == 0
    printed = capsys.readouterr().out
    table = pq.read_table(out / "scores.parquet").to_pydict()
    kept = split_rows(open_codes(store), 0.3)[0]
    trained = np.isin(np.arange(40), kept)
    assert table["trained_on"] == trained.tolist()
    bits, z = np.array(table["bits"]), np.array(table["z"])
    record = json.loads((out / "score.json").read_bytes())
    assert [side["trained_on"] for side in record["training"]] == [False, True]
    for side, here, words in zip(
        record["training"], (~trained, trained), ("not trained on", "trained on"), strict=True
    ):
        assert side["rows"] == here.sum()
        assert (side["bits"], side["z"]) == pytest.approx((bits[here].mean(), z[here].mean()))
        by_hand = (bits[here] - bits[here].mean()) / bits[here].std()
        np.testing.assert_allclose(np.array(table["trained_on_z"])[here], by_hand, atol=1e-6)
        assert f"  {words}: {here.sum()} rows, {side['bits_per_code']:.3f} bits per code" in printed
    for entry in record["least_likely"]:
        assert entry["trained_on"] == trained[entry["row"]]
    first = record["least_likely"][0]
    assert f", {'trained on' if first['trained_on'] else 'not trained on'}: {first['bits']:,.1f} bits" in printed


def test_other_class_names_in_the_store_are_warned_of(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names, said in ((["cat", "fox", "owl"], True), (["cat", "", "owl"], False), ([], False)):
        priors.save(priors.Prior(toy().config, names).eval(), tmp_path / "prior")
        assert run("score", tmp_path / "prior", store, "--out", tmp_path / f"scores-{len(names)}-{said}") == 0
        warning = (
            f"warning: label 1 is 'dog' in {store} and 'fox' to {tmp_path / 'prior'}; so it is with 1 of 3 classes."
        )
        assert (warning in capsys.readouterr().out) == said


def test_without_names_in_the_store_classes_have_the_priors(
    make_store: Any, stores: Any, tmp_path: Path, no_fsync: None
) -> None:
    store = make_store(tmp_path / "codes.zarr", 8, spec=replace(stores.two_levels, corpus={}))
    priors.save(priors.Prior(toy().config, ["cat", "fox"]).eval(), tmp_path / "prior")
    assert run("score", tmp_path / "prior", store, "--out", tmp_path / "scores") == 0
    record = json.loads((tmp_path / "scores" / "score.json").read_bytes())
    assert {entry["label"]: entry["name"] for entry in record["labels"]} == {-1: "", 0: "cat", 1: "fox", 2: ""}


def test_only_the_rows_that_are_read_need_known_labels(store: Path, tmp_path: Path) -> None:
    priors.save(toy(2), tmp_path / "prior")
    assert run("score", tmp_path / "prior", store, "--rows", "0:2", "--out", tmp_path / "scores") == 0


def test_residual_codes_are_refused_with_their_axes(
    stores: Any, prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = replace(
        stores.two_levels, levels=(LevelSpec("top", 16, (2, 2)), LevelSpec("bottom", 16, (3, 4, 2), "depth"))
    )
    store = stores.write(tmp_path / "residual.zarr", spec, stores.codes(spec, 8))
    assert run("score", prior, store, "--out", tmp_path / "scores") == 2
    assert "level 'bottom' has the axes row, depth, y, x" in capsys.readouterr().err


def test_a_prior_that_diverged_is_an_error(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toy()
    for parameter in model.level_prior("bottom").parameters():
        parameter.data.fill_(math.nan)
    priors.save(model, tmp_path / "prior")
    assert run("score", tmp_path / "prior", store, "--out", tmp_path / "scores") == 1
    assert "level 'bottom' costs nan bits a code somewhere in rows 0..20" in capsys.readouterr().err
    assert not (tmp_path / "scores").exists()


def test_the_same_command_again_says_the_same_and_another_is_refused(
    store: Path, prior: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("score", prior, store, "--out", tmp_path / "scores")
    assert run(*command) == 0
    first = capsys.readouterr().out.splitlines()
    table = (tmp_path / "scores" / "scores.parquet").stat().st_mtime_ns
    assert run(*command, "--batch-size", "5") == 0
    again = capsys.readouterr().out.splitlines()
    assert "already scored" in again[0]
    assert again[1:] == first
    assert (tmp_path / "scores" / "scores.parquet").stat().st_mtime_ns == table
    assert run(*command, "--num", "3") == 2
    assert "num: there 8, now 3" in capsys.readouterr().err


def test_a_stopped_run_is_made_anew_and_whole(
    store: Path, prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for out in ("stopped", "whole"):
        with monkeypatch.context() as patched:
            if out == "stopped":
                patched.setattr("pipelines.score.save_picture", stop)
                assert run("score", prior, store, "--out", tmp_path / out) == 1
                assert not (tmp_path / out).exists()
        assert run("score", prior, store, "--out", tmp_path / out) == 0
    made = [
        {path.relative_to(tmp_path / out): path for path in (tmp_path / out).rglob("*")} for out in ("stopped", "whole")
    ]
    assert made[0].keys() == made[1].keys()
    for name, path in made[0].items():
        assert path.is_dir() or name.name == "run.json" or path.read_bytes() == made[1][name].read_bytes()


def test_equal_rows_have_z_zero_though_their_bits_are_rounded() -> None:
    assert z_scores(np.array([100.0, 100.0 + 1e-6, 100.0])).tolist() == [0, 0, 0]
    assert z_scores(np.array([100.0, 101.0, 5.0]), np.array([3, 3, 8])).tolist() == [-1, 1, 0]


def test_no_row_is_at_both_ends() -> None:
    bits = np.array([3.0, 1.0, 2.0, 2.0, 9.0])
    assert [part.tolist() for part in ends(bits, 2)] == [[4, 0], [1, 3]]
    assert [part.tolist() for part in ends(bits, 9)] == [[4, 0, 2], [1, 3]]
    assert [part.tolist() for part in ends(bits[:1], 9)] == [[0], []]
