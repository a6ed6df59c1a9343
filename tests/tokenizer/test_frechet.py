"""The Fréchet distance against closed forms, and the network's layout and poolings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import inception
from torchvision.models.inception import Inception3

from tokenizer.frechet import Inception, Moments, frechet_distance, load_inception
from vqmill.errors import UsageError


def vectors(number: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, size, generator=generator, dtype=torch.float64) @ torch.randn(
        size, size, generator=generator, dtype=torch.float64
    )


def moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = Moments()
    for part in values.split(7):
        found.add(part)
    return found.result()


def test_moments_are_mean_and_covariance():
    values = 5 + vectors(50, 4, 0)
    mean, covariance = moments(values)
    torch.testing.assert_close(mean, values.mean(dim=0))
    torch.testing.assert_close(covariance, torch.cov(values.T))


@pytest.mark.parametrize("number", [5, 200], ids=["rank deficient", "full rank"])
def test_equal_sets_have_no_distance(number: int):
    found = moments(vectors(number, 16, 1))
    assert frechet_distance(found, found) == pytest.approx(0, abs=1e-5 * float(found[1].trace()))


def test_diagonal_gaussians_have_the_closed_form():
    one, two = torch.tensor([1.0, 4.0, 0.0]).double(), torch.tensor([9.0, 0.25, 4.0]).double()
    mean = torch.tensor([1.0, 2.0, 2.0]).double()
    found = frechet_distance((torch.zeros(3).double(), one.diag()), (mean, two.diag()))
    assert found == pytest.approx(9 + float((one.sqrt() - two.sqrt()).square().sum()))


def test_gaussians_that_do_not_commute():
    """Against the eigenvalues of the product itself, which need no symmetric root."""
    first, second = moments(vectors(60, 6, 2)), moments(1 + vectors(60, 6, 3))
    shared = torch.linalg.eigvals(first[1] @ second[1]).real.sqrt().sum()
    expected = (first[0] - second[0]).square().sum() + first[1].trace() + second[1].trace() - 2 * shared
    assert frechet_distance(first, second) == pytest.approx(float(expected))
    assert frechet_distance(second, first) == pytest.approx(float(expected))
    assert float(expected) > 1


def test_one_image_has_no_covariance():
    with pytest.raises(UsageError, match="at least 2 images"):
        moments(vectors(1, 4, 0))


def test_the_layout_is_that_of_the_published_weights():
    with torch.device("meta"):
        mine, theirs = Inception().net, Inception3(1008, aux_logits=False, init_weights=False)
    shapes = [{name: tuple(value.shape) for name, value in net.state_dict().items()} for net in (mine, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["Mixed_5b", "Mixed_5d", "Mixed_6b", "Mixed_6e", "Mixed_7b", "Mixed_7c"])
def test_averages_leave_the_padding_out_and_the_last_block_takes_maxima(name: str):
    torch.manual_seed(0)
    block = getattr(Inception().net, name).eval()
    width = block.branch_pool.conv.in_channels
    values = torch.rand(1, width, 5, 5)
    original = getattr(Inception3(1008, aux_logits=False, init_weights=False), name).eval()
    original.load_state_dict(block.state_dict())
    with torch.no_grad():
        mine, theirs = block(values), original(values)
        rows = [[values[0, :, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] for x in range(5)] for y in range(5)]
        pool = torch.amax if name == "Mixed_7c" else torch.mean
        pooled = torch.stack([torch.stack([pool(window, dim=(1, 2)) for window in row], -1) for row in rows], -2)
        last = block.branch_pool(pooled[None])
    others = mine.shape[1] - last.shape[1]
    torch.testing.assert_close(mine[:, others:], last)
    torch.testing.assert_close(mine[:, :others], theirs[:, :others])
    assert not torch.allclose(mine[:, others:], theirs[:, others:])
    assert isinstance(block, (inception.InceptionA, inception.InceptionC, inception.InceptionE))


def test_features_of_bytes(inception_file: Path):
    model = load_inception(inception_file)
    images = torch.randint(0, 256, (2, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = model(images)
    assert found.shape == (2, 2048)
    assert not torch.allclose(found[0], found[1], rtol=1e-3)
    torch.testing.assert_close(found, model(images.expand(-1, 3, -1, -1)))


def test_torchvisions_own_weights_are_refused(tmp_path: Path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "inception_v3_google.pth")
    with pytest.raises(UsageError, match="expected pt_inception-2015-12-05"):
        load_inception(tmp_path / "inception_v3_google.pth")
    with pytest.raises(UsageError, match="no such file"):
        load_inception(tmp_path / "nowhere.pth")
