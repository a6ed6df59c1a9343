"""Checkpoints: what is saved is loaded, and nothing else is believed."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from vqmill import CodesError
from vqmill.checkpoint import (
    build_module,
    dump_checkpoint,
    fingerprint,
    load_checkpoint,
    parse_checkpoint,
    save_checkpoint,
)

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.25, 0.0078125], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}
METADATA = {"preset": "grey28", "config": {"codebook_size": 256, "rates": [0.25, 1e-9]}, "name": "é"}


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    save_checkpoint(path, TENSORS, METADATA)
    tensors, metadata = load_checkpoint(path)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]


def test_views_that_share_memory_are_saved_apart(tmp_path):
    base = torch.arange(10.0)
    save_checkpoint(tmp_path / "a", {"all": base, "part": base[2:5], "same": base}, {})
    tensors, _ = load_checkpoint(tmp_path / "a")
    assert torch.equal(tensors["part"], base[2:5])
    assert torch.equal(tensors["same"], base)


def test_parameters_are_saved_without_their_gradient():
    parameter = torch.nn.Parameter(torch.ones(2))
    tensors, _ = parse_checkpoint(dump_checkpoint({"p": parameter}, {}), "bytes")
    assert not tensors["p"].requires_grad


def test_the_same_content_gives_the_same_bytes():
    turned = dict(reversed(list(TENSORS.items())))
    assert dump_checkpoint(TENSORS, METADATA) == dump_checkpoint(turned, dict(reversed(list(METADATA.items()))))


def test_a_checkpoint_is_replaced_whole(tmp_path):
    save_checkpoint(tmp_path / "a", TENSORS, {"step": 1})
    save_checkpoint(tmp_path / "a", {"x": torch.ones(1)}, {"step": 2})
    assert load_checkpoint(tmp_path / "a")[1] == {"step": 2}


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(CodesError, match="no such checkpoint"):
            load_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_cut_files_are_damaged(tmp_path, kept):
    data = dump_checkpoint(TENSORS, METADATA)
    (tmp_path / "cut").write_bytes(data[:kept])
    with pytest.raises(CodesError, match=r"cut: not a whole safetensors file"):
        load_checkpoint(tmp_path / "cut")


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"PK\x03\x04" + b"x" * 1000,
        b"\x80\x04\x95" + b"x" * 1000,
        b"\xff" * 1000,
        safetensors.torch.save({"a": torch.ones(2)}),
        safetensors.torch.save({"a": torch.ones(2)}, metadata={"format": "pt"}),
        safetensors.torch.save({"a": torch.ones(2)}, metadata={"vqmill": "3"}),
        safetensors.torch.save({"a": torch.ones(2)}, metadata={"vqmill": "{"}),
        safetensors.torch.save({"a": torch.ones(2)}, metadata={"vqmill": "[" * 200_000}),
        header(__metadata__={"vqmill": "{}"}, a={"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}) + b"\0",
        header(__metadata__={"vqmill": "{}"}, a={"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}) + b"\0",
        header(__metadata__={"vqmill": "{}"}, a={"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}),
    ],
    ids=["zip", "pickle", "ones", "foreign", "foreign2", "number", "cut-json", "deep-json", "e8m0", "f4", "no-data"],
)
def test_foreign_files_are_refused(data):
    with pytest.raises(CodesError, match=r"^somewhere: "):
        parse_checkpoint(data, "somewhere")


def test_any_flipped_header_bit_is_a_codes_error_or_harmless():
    data = dump_checkpoint(TENSORS, METADATA)
    for place in range(8 + int.from_bytes(data[:8], "little")):
        for bit in (1, 0x10, 0x80):
            flipped = bytearray(data)
            flipped[place] ^= bit
            try:
                parse_checkpoint(bytes(flipped), "flipped")
            except CodesError:
                continue


def test_a_fingerprint_names_exactly_these_weights():
    config = {"codebook_size": 256, "nested": {"a": 1, "b": 2}}
    expected = fingerprint(TENSORS, config)
    assert len(expected) == 32
    assert int(expected, 16) >= 0
    assert (
        fingerprint(dict(reversed(list(TENSORS.items()))), {"nested": {"b": 2, "a": 1}, "codebook_size": 256})
        == expected
    )
    assert fingerprint({name: tensor.clone() for name, tensor in TENSORS.items()}, config) == expected
    loaded, _ = parse_checkpoint(dump_checkpoint(TENSORS, {}), "bytes")
    assert fingerprint(loaded, config) == expected


@pytest.mark.parametrize("name", [name for name in TENSORS if TENSORS[name].numel()])
def test_a_fingerprint_changes_with_any_value_name_or_dtype(name):
    others = {key: tensor for key, tensor in TENSORS.items() if key != name}
    tensor = TENSORS[name]
    changed = tensor.clone().contiguous()
    changed.view(-1)[-1] = not changed.view(-1)[-1] if tensor.dtype == torch.bool else changed.view(-1)[-1] / 2 + 1
    prints = {
        fingerprint(TENSORS, {}),
        fingerprint(others, {}),
        fingerprint({**others, name: changed}, {}),
        fingerprint({**others, name: tensor.reshape(-1, 1)}, {}),
        fingerprint({**others, name + "2": tensor}, {}),
        fingerprint({**others, name: tensor.to(torch.float64)}, {}),
    }
    assert len(prints) == 6


def test_a_fingerprint_changes_with_the_configuration():
    configs = [{}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1]}, {"a": None}]
    assert len({fingerprint(TENSORS, config) for config in configs}) == len(configs)


def test_a_network_is_built_around_the_tensors_of_a_file():
    tensors = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
    state = torch.get_rng_state()
    module = build_module(lambda: torch.nn.Linear(3, 2), tensors)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(module(torch.ones(1, 3)), torch.tensor([[4.0, 13.0]]))
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias": None}, "1 differ, first 'bias': expected torch.float32 [2], found nothing"),
        ({"more": torch.ones(1)}, "first 'more': expected nothing, found torch.float32 [1]"),
        ({"bias": torch.ones(3)}, "found torch.float32 [3]"),
        ({"bias": torch.ones(2).double()}, "found torch.float64 [2]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changed, message):
    tensors = {"weight": torch.zeros(2, 3), "bias": torch.ones(2)} | changed
    with pytest.raises(CodesError) as caught:
        build_module(lambda: torch.nn.Linear(3, 2), {k: v for k, v in tensors.items() if v is not None})
    assert message in str(caught.value)


def test_a_network_beyond_all_memory_is_refused_without_being_made():
    with pytest.raises(CodesError, match="do not fit"):
        build_module(lambda: torch.nn.Linear(1 << 25, 1 << 25), {"weight": torch.zeros(1, 1), "bias": torch.ones(1)})
