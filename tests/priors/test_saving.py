"""A prior on disk is the same prior, or an error that says why not."""

import pytest
import torch

from priors import Prior, load, save
from priors.level import inference
from vqmill.checkpoint import load_checkpoint, save_checkpoint
from vqmill.errors import CodesError


def test_round_trip_keeps_logits_configuration_and_fingerprint(toy, tmp_path):
    file = save(toy, tmp_path / "run")
    assert file == tmp_path / "run" / "prior.safetensors"
    for path in (tmp_path / "run", file, str(file)):
        again = load(path)
        assert again.config == toy.config
        assert again.fingerprint == toy.fingerprint
        assert not again.training
    codes = torch.randint(0, 5, (3, 2, 2))
    label = torch.tensor([0, 1, -1])
    with inference(toy), inference(again):
        before, after = (
            prior.level_prior("top")(codes, prior.level_prior("top").condition(label, {})) for prior in (toy, again)
        )
    assert torch.equal(before, after)


def test_the_fingerprint_follows_the_weights(toy):
    before = toy.fingerprint
    assert len(before) == 32
    with torch.no_grad():
        next(toy.parameters()).add_(1)
    assert toy.fingerprint != before


def test_class_names_are_kept_and_are_no_part_of_the_fingerprint(toy, tmp_path):
    named = Prior(toy.config, ["cat", ""])
    named.load_state_dict(toy.state_dict())
    assert named.fingerprint == toy.fingerprint
    save(named, tmp_path)
    assert load(tmp_path).class_names == ("cat", "")
    assert load(save(toy, tmp_path)).class_names == ()


def test_files_of_before_class_names_load(toy, tmp_path):
    file = save(toy, tmp_path)
    tensors, metadata = load_checkpoint(file)
    save_checkpoint(file, tensors, {name: value for name, value in metadata.items() if name != "class_names"})
    again = load(file)
    assert (again.class_names, again.fingerprint) == ((), toy.fingerprint)


@pytest.mark.parametrize("names", ["cat", [1], None, {"0": "cat"}, ["a", "b", "c", "d"]])
def test_names_that_are_none_are_refused(toy, tmp_path, names):
    file = save(toy, tmp_path)
    tensors, metadata = load_checkpoint(file)
    save_checkpoint(file, tensors, metadata | {"class_names": names})
    with pytest.raises(CodesError, match=r"prior\.safetensors: class_names: expected"):
        load(file)


def resized(metadata, **sizes):
    networks = [network | sizes for network in metadata["config"]["networks"]]
    return metadata | {"config": metadata["config"] | {"networks": networks}}


def test_wrong_files_are_refused(toy, tmp_path):
    with pytest.raises(CodesError, match=r"not a prior: nothing in it is an output of vqmill's\. Expected the folder"):
        load(tmp_path)
    file = save(toy, tmp_path)
    tensors, metadata = load_checkpoint(file)
    name = next(iter(tensors))
    for changed_tensors, changed_metadata, message in (
        (tensors, {"kind": "tokenizer"}, "expected a prior"),
        (tensors, {"kind": "prior"}, "configuration is missing"),
        ({k: v for k, v in tensors.items() if k != name}, metadata, "do not fit"),
        (tensors | {name: tensors[name] + 1}, metadata, "fingerprint"),
        (tensors | {name: tensors[name].double()}, metadata, "do not fit"),
        (tensors, metadata | {"config": metadata["config"] | {"deepth": 1}}, "unknown key"),
        (
            tensors,
            metadata | {"config": metadata["config"] | {"levels": None}},
            r"prior\.safetensors: levels: expected a list",
        ),
        (tensors, resized(metadata, depth=10**9), r"prior\.safetensors: depth: expected"),
        (tensors, resized(metadata, depth=1 << 14, vertical=64), "do not fit"),  # 2^44 bytes a layer
    ):
        save_checkpoint(file, changed_tensors, changed_metadata)
        with pytest.raises(CodesError, match=message):
            load(file)


def test_a_prior_of_an_earlier_version_says_what_to_do(toy, tmp_path):
    file = save(toy, tmp_path)
    tensors, metadata = load_checkpoint(file)
    (network, *_) = metadata["config"].pop("networks")
    save_checkpoint(file, tensors, metadata | {"config": metadata["config"] | {"depth": network["depth"]}})
    with pytest.raises(CodesError, match=r"earlier version of vqmill.*vqmill train-prior STORE"):
        load(file)
