"""Tokenizers on disk, and what their fingerprint depends on."""

from __future__ import annotations

import pytest
import torch

import tokenizer
from vqmill import CodesError
from vqmill.checkpoint import load_checkpoint, save_checkpoint

SMALL = {"codebook_size": 16, "code_dim": 8, "hidden_dim": 8, "residual_dim": 4, "num_residual_blocks": 1}


def small(**overrides) -> tokenizer.Tokenizer:
    torch.manual_seed(0)
    return tokenizer.from_preset("rgb32", **{**SMALL, **overrides})


@pytest.mark.parametrize("preset", ["grey28", "rgb32"])
def test_a_loaded_tokenizer_is_the_saved_one(tmp_path, preset):
    model = tokenizer.from_preset(preset, **SMALL)
    path = tokenizer.save(model, tmp_path / "run")
    images = torch.randint(0, 256, (2, model.config.channels, 16, 16), dtype=torch.uint8)
    random_state = torch.get_rng_state()
    for place in (path, path.parent, str(path.parent)):
        loaded = tokenizer.load(place)
        assert loaded.fingerprint == model.fingerprint
        assert loaded.config == model.config
        assert not loaded.training
        codes, expected = loaded.encode(images), model.encode(images)
        assert all(torch.equal(codes[name], expected[name]) for name in expected)
        assert torch.equal(loaded.decode(codes), model.decode(expected))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_fingerprint_follows_weights_codebook_and_configuration():
    model = small()
    before = model.fingerprint
    assert len(before) == 32
    assert small().fingerprint == before
    assert small(commitment_cost=0.5).fingerprint != before
    for tensor in (next(model.parameters()), model.quantizers["bottom"].codebook):
        with torch.no_grad():
            tensor.view(-1)[0] += 1
        assert model.fingerprint != before
        before = model.fingerprint


def test_changed_files_are_refused(tmp_path):
    path = tokenizer.save(small(), tmp_path)
    tensors, metadata = load_checkpoint(path)

    def rewritten(new_tensors, new_metadata):
        save_checkpoint(path, new_tensors, new_metadata)
        return path

    name = "net.to_code.0.bias"
    with pytest.raises(CodesError, match="changed after it was saved"):
        tokenizer.load(rewritten({**tensors, name: tensors[name] + 1}, metadata))
    with pytest.raises(CodesError, match=r"1 differ, first 'net\.to_code\.0\.bias'.*found nothing"):
        tokenizer.load(rewritten({key: value for key, value in tensors.items() if key != name}, metadata))
    with pytest.raises(CodesError, match="'surplus': expected nothing"):
        tokenizer.load(rewritten({**tensors, "surplus": torch.zeros(1)}, metadata))
    with pytest.raises(CodesError, match="float64"):
        tokenizer.load(rewritten({**tensors, name: tensors[name].double()}, metadata))
    with pytest.raises(CodesError, match="do not fit"):
        tokenizer.load(rewritten(tensors, {**metadata, "config": metadata["config"] | {"codebook_size": 32}}))
    with pytest.raises(CodesError, match="Did you mean 'size'"):
        tokenizer.load(rewritten(tensors, {**metadata, "config": metadata["config"] | {"sise": 32}}))
    with pytest.raises(CodesError, match="expected a tokenizer, found 'prior'"):
        tokenizer.load(rewritten(tensors, {**metadata, "kind": "prior"}))


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(CodesError, match=r"not a tokenizer: .* Expected the folder that `vqmill train-tokenizer`"):
        tokenizer.load(tmp_path)
