"""Small priors and codes that the tests of this folder share."""

import pytest
import torch

from priors import LevelShape, Prior, from_preset

TOY_LEVELS = (LevelShape("top", 5, (2, 2)), LevelShape("bottom", 6, (4, 4)))


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks this small lose more to waiting for threads, on a machine that does other things, than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy():
    """A two-level prior with random weights, large enough to prefer some codes clearly."""
    return make_toy()


def make_toy(seed: int = 0, **overrides: object) -> Prior:
    torch.manual_seed(seed)
    options = {"depth": 8, "num_layers": 2} | overrides
    return from_preset("pixelcnn-tiny", TOY_LEVELS, 3, "tok", **options)


@pytest.fixture
def toy_batch():
    """Codes and labels for `toy`, in the dtypes of a store."""
    generator = torch.Generator().manual_seed(0)
    return {
        "top": torch.randint(0, 5, (6, 2, 2), generator=generator).to(torch.uint8),
        "bottom": torch.randint(0, 6, (6, 4, 4), generator=generator).to(torch.uint16),
        "label": torch.tensor([0, 1, 2, -1, 0, 1]),
    }
