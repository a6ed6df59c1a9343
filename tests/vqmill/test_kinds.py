"""What places hold: told by their files, and said where something else was expected."""

from __future__ import annotations

import json

import pytest

from vqmill import CodesError, open_codes
from vqmill.kinds import checkpoint_file, command_of, held_by, kind_of, unfinished_of, wrong_place


def settings(folder, command):
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"command": command}))
    return folder


@pytest.fixture
def places(tmp_path, finished_store):
    """One place of each kind, and others that are none of ours."""
    for name in ("tokenizer", "prior", "photos", "group", "odd"):
        (tmp_path / name).mkdir()
    for name in ("tokenizer", "prior"):
        (tmp_path / name / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    (tmp_path / "group/zarr.json").write_text(
        '{"zarr_format": 3, "node_type": "group", "attributes": {"unit": "bits"}}'
    )
    (tmp_path / "odd/settings.json").write_text("[")
    settings(tmp_path / "evaluation", "evaluate")
    settings(tmp_path / "scores", "score")
    settings(tmp_path / "run.partial", "train-prior")
    settings(tmp_path / "other", "of another project")
    return {"store": finished_store} | {path.name: path for path in tmp_path.iterdir()}


KINDS = {
    "store": ("store", "it holds a code store"),
    "group": ("zarr", "it holds a Zarr array or group that is no code store"),
    "tokenizer": ("tokenizer", "it holds a tokenizer"),
    "prior": ("prior", "it holds a prior"),
    "evaluation": ("evaluation", "it holds an evaluation of a tokenizer"),
    "scores": ("scores", "it holds the scores of a store's rows"),
    "run.partial": ("unfinished", "it holds an unfinished run of train-prior; see: vqmill inspect "),
    "photos": (None, "nothing in it is an output of vqmill's"),
    "odd": (None, "nothing in it is an output of vqmill's"),
    "other": (None, "nothing in it is an output of vqmill's"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_told_and_named(name, places):
    kind, words = KINDS[name]
    assert kind_of(places[name]) == kind
    assert held_by(places[name]).startswith(words)


READERS = {
    "store": ("code store", open_codes),
    "tokenizer": ("tokenizer", lambda path: checkpoint_file(path, "tokenizer")),
    "prior": ("prior", lambda path: checkpoint_file(path, "prior")),
}


@pytest.mark.parametrize("expected", READERS)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "group"])
def test_a_place_of_another_kind_says_what_it_is(name, expected, places):
    noun, read = READERS[expected]
    if name == expected:
        read(places[name])
        return
    with pytest.raises(CodesError) as caught:
        read(places[name])
    assert f"{places[name]}: not a {noun}: {KINDS[name][1]}" in str(caught.value)
    assert "Expected the folder that `vqmill t" in str(caught.value)


def test_files_are_told_too(places):
    file = places["prior"] / "prior.safetensors"
    assert checkpoint_file(file, "prior") == file
    with pytest.raises(CodesError, match="not a tokenizer: it is a prior"):
        checkpoint_file(file, "tokenizer")
    assert "a file that vqmill did not write" in str(wrong_place(places["photos"] / "a.jpg", "store"))


def test_what_is_not_there_leads_to_the_unfinished_run(places, tmp_path):
    out = tmp_path / "run"
    assert unfinished_of(out) == places["run.partial"]
    expected = f"{out}: no such prior, but {out}.partial holds an unfinished run of train-prior; see: vqmill inspect"
    assert expected in str(wrong_place(out, "prior"))
    assert str(wrong_place(tmp_path / "nowhere", "store")).startswith(
        f"{tmp_path / 'nowhere'}: no such code store. Exp"
    )
    out.mkdir()
    assert unfinished_of(out) is None, "what is finished comes first"
    assert command_of(out) is None
