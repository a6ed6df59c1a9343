"""LPIPS with random weights in the published layouts: a distance, the one of the paper, and clear refusals."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torchvision

from tokenizer.lpips import load_lpips
from vqmill.errors import CodesError, UsageError


def images(seed: int, side: int = 40, channels: int = 3) -> torch.Tensor:
    return 2 * torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("name", ["alex", "vgg"])
def test_it_is_a_distance(published_weights: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(published_weights))
    model = load_lpips(published_weights / f"{name}.pth")
    first, second = images(0), images(1)
    assert model(first, first).tolist() == [0, 0]
    assert (model(first, second) > 1e-4).all()
    torch.testing.assert_close(model(first, second), model(second, first))
    nearer = 0.9 * first + 0.1 * second
    assert (model(first, nearer) < model(first, second)).all()
    torch.testing.assert_close(model(first, second)[1:], model(first[1:], second[1:]), rtol=1e-4, atol=1e-6)


def test_it_is_the_sum_that_the_paper_writes(published_weights: Path) -> None:
    path = published_weights / "checkpoints/alexnet-owt-7be5be79.pth"
    model = load_lpips(published_weights / "alex.pth", path)
    first, second = images(0), images(1)
    network = torchvision.models.alexnet(weights=None)
    network.load_state_dict(torch.load(path, weights_only=True), strict=False)
    linear = torch.load(published_weights / "alex.pth", weights_only=True)
    seen: list[torch.Tensor] = []
    for layer in network.features:
        if isinstance(layer, torch.nn.ReLU):
            layer.register_forward_hook(lambda module, given, made: seen.append(made.detach().clone()))
    mean, deviation = torch.tensor([-0.03, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.45])
    for batch in (first, second):
        network.features[:12](((batch.permute(0, 2, 3, 1) - mean) / deviation).permute(0, 3, 1, 2))
    assert len(seen) == 10
    expected = [0.0, 0.0]
    for place, (a, b) in enumerate(zip(seen[:5], seen[5:], strict=True)):
        unit_a, unit_b = a / (a.norm(dim=1, keepdim=True) + 1e-10), b / (b.norm(dim=1, keepdim=True) + 1e-10)
        for number in range(2):
            difference = (unit_a[number] - unit_b[number]) ** 2
            counted = (difference * linear[f"lin{place}.model.1.weight"][0]).sum(dim=0)
            expected[number] += float(counted.mean())
    assert model(first, second).tolist() == pytest.approx(expected, rel=1e-4)


def test_grey_images_are_seen_as_rgb(published_weights: Path) -> None:
    model = load_lpips(published_weights / "alex.pth", published_weights / "checkpoints/alexnet-owt-7be5be79.pth")
    first, second = images(0, channels=1), images(1, channels=1)
    assert torch.equal(model(first, second), model(first.expand(-1, 3, -1, -1), second.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(("name", "side"), [("alex", 31), ("vgg", 16)])
def test_the_smallest_images(published_weights: Path, name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(published_weights))
    model = load_lpips(published_weights / f"{name}.pth")
    assert (model(images(0, side), images(1, side)) > 0).all()
    with pytest.raises(CodesError, match=f"at least {side} pixels"):
        model(images(0, side - 1), images(1, side - 1))


def test_files_that_are_not_what_they_should_be(
    published_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    alexnet = published_weights / "checkpoints/alexnet-owt-7be5be79.pth"
    with pytest.raises(UsageError, match=r"alexnet-owt-7be5be79\.pth: no such file; .* Nothing is downloaded"):
        load_lpips(published_weights / "alex.pth")
    with pytest.raises(UsageError, match=r"nowhere\.pth: no such file"):
        load_lpips(tmp_path / "nowhere.pth", alexnet)
    with pytest.raises(UsageError, match="found other weights"):
        load_lpips(alexnet, alexnet)
    with pytest.raises(UsageError, match="found other weights"):
        load_lpips(published_weights / "vgg.pth", alexnet)
    torch.save({f"lin{place}.model.1.weight": torch.rand(1, 8, 1, 1) for place in range(5)}, tmp_path / "eight.pth")
    with pytest.raises(UsageError, match="weights of another network"):
        load_lpips(tmp_path / "eight.pth", alexnet)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="other than named tensors"):
        load_lpips(tmp_path / "list.pth", alexnet)
    shutil.copy(published_weights / "alex.pth", tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:100])
    with pytest.raises(UsageError, match="no weights can be read"):
        load_lpips(tmp_path / "cut.pth", alexnet)


class Evil:
    """What a hostile .pth file carries."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"lin0.model.1.weight": Evil(tmp_path / "run")}, tmp_path / "evil.pth")
    with pytest.raises(UsageError, match="no weights can be read"):
        load_lpips(tmp_path / "evil.pth")
    assert not (tmp_path / "run").exists()
