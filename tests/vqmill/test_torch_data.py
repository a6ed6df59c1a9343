"""The torch side of the loader: tensors, a DataLoader around it, ranks from torch.distributed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import vqmill
from vqmill import CodesDataset, CodesError


@pytest.fixture(scope="module")
def codes(finished_store):
    return vqmill.open_codes(finished_store)


def test_tensors_equal_the_batches(codes):
    expected = list(codes.batches(4, shuffle=True, seed=2))
    found = list(CodesDataset(codes, 4, shuffle=True, seed=2))
    assert len(found) == len(expected) == 6
    for tensors, arrays in zip(found, expected, strict=True):
        assert tensors.keys() == arrays.keys()
        for name, values in arrays.items():
            assert tensors[name].dtype == torch.int64
            np.testing.assert_array_equal(tensors[name].numpy(), values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32, torch.float16])
def test_codes_come_in_the_dtype_that_is_asked_for(codes, dtype):
    batch = next(iter(CodesDataset(codes, 21, dtype=dtype)))
    assert batch["top"].dtype == batch["bottom"].dtype == dtype
    assert batch["top"].to(torch.int64).tolist() == codes["top"][:].tolist()
    assert batch["label"].dtype == batch["row"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool, torch.bfloat16, torch.complex64])
def test_a_dtype_that_cannot_hold_the_codes_is_refused(codes, dtype):
    with pytest.raises(CodesError, match=r"cannot hold the codes 0\.\.511"):
        CodesDataset(codes, 4, dtype=dtype)


def test_in_a_data_loader(codes):
    loader = DataLoader(CodesDataset(codes, 4, shuffle=True), batch_size=None)
    assert len(loader) == 6
    rows = [row for batch in loader for row in batch["row"].tolist()]
    assert sorted(rows) == list(range(21))
    assert rows != [row for batch in loader for row in batch["row"].tolist()]  # the next epoch


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork in a process with threads
def test_worker_processes_are_refused(codes):
    loader = DataLoader(CodesDataset(codes, 4), batch_size=None, num_workers=1)
    with pytest.raises(CodesError, match="num_workers=0"):
        next(iter(loader))


def test_states(codes):
    dataset = CodesDataset(codes, 4, shuffle=True)
    iterator = iter(dataset)
    next(iterator)
    state = dataset.state_dict()
    expected = [batch["row"].tolist() for batch in iterator]
    resumed = CodesDataset(codes, 4, shuffle=True)
    resumed.load_state_dict(state)
    assert [batch["row"].tolist() for batch in resumed] == expected


def test_ranks_are_those_of_torch_distributed(codes, monkeypatch):
    alone = [row for batch in CodesDataset(codes, 2) for row in batch["row"].tolist()]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parts.append([row for batch in CodesDataset(codes, 2) for row in batch["row"].tolist()])
    assert sorted(row for part in parts for row in part) == sorted(alone)
    assert [len(part) for part in parts] == [7, 7, 7]
    assert len(CodesDataset(codes, 4, rank=1, world_size=3)) == 2
    with pytest.raises(CodesError, match="belong together"):
        CodesDataset(codes, 4, rank=1)


def test_mixed_stores(codes):
    dataset = CodesDataset([(codes, 1), (codes, 3)], 8)
    for batch in islice(dataset, 3):
        assert batch["store"].sum() == 6
        assert batch["top"].dtype == torch.int64
    with pytest.raises(TypeError, match="without end"):
        len(dataset)


def test_options_reach_the_loader(codes):
    assert len(CodesDataset(codes, 4, last="drop")) == 5
    with pytest.raises(CodesError, match="last must be"):
        CodesDataset(codes, 4, last="all")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_come_to_the_gpu(codes):
    expected = list(codes.batches(4, shuffle=True))
    for tensors, arrays in zip(CodesDataset(codes, 4, device="cuda", shuffle=True), expected, strict=True):
        for name, values in arrays.items():
            assert tensors[name].is_cuda
            np.testing.assert_array_equal(tensors[name].cpu().numpy(), values)
