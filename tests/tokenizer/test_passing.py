"""How gradients pass a quantizer, against the matrices of the papers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tokenizer.passing import pass_gradient

D = 5


def gradient(z, entry, upstream, rotation):
    """Of one feature [D]."""
    z = z.clone().requires_grad_()
    out = pass_gradient(z[None, :, None, None], entry[None, :, None, None], rotation=rotation)
    assert torch.equal(out.flatten(), entry)
    (found,) = torch.autograd.grad(out, z, upstream[None, :, None, None])
    return found


def rotated_and_scaled(z, entry):
    """Fifty et al. 2024, section 4.2: λ (I - 2 r r' + 2 q e'), with e and q the directions of feature and entry, r that of e + q."""
    e, q = F.normalize(z, dim=0), F.normalize(entry, dim=0)
    r = F.normalize(e + q, dim=0)
    turn = torch.eye(D) - 2 * torch.outer(r, r) + 2 * torch.outer(q, e)
    return entry.norm() / z.norm() * turn


@pytest.mark.parametrize("seed", range(5))
def test_gradients_turn_as_the_feature_was_turned(seed):
    z, entry, upstream = torch.randn(3, D, generator=torch.Generator().manual_seed(seed))
    matrix = rotated_and_scaled(z, entry)
    torch.testing.assert_close(matrix @ z, entry)
    torch.testing.assert_close(gradient(z, entry, upstream, True), matrix.T @ upstream)
    assert torch.equal(gradient(z, entry, upstream, False), upstream)
    assert not torch.allclose(gradient(z, entry, upstream, True), upstream, atol=1e-3)
    angle = F.cosine_similarity(entry, upstream, dim=0)
    torch.testing.assert_close(
        F.cosine_similarity(z, gradient(z, entry, upstream, True), dim=0), angle
    )  # angles are kept


def test_parallel_features_differ_from_straight_through_by_their_length_only():
    z, upstream = torch.randn(2, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gradient(z, z.clone(), upstream, True), upstream)
    torch.testing.assert_close(gradient(z, 3 * z, upstream, True), 3 * upstream)


@pytest.mark.parametrize("name", ["equal", "opposite", "zero feature", "zero entry", "both zero"])
def test_awkward_places_stay_finite(name):
    entry, upstream = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    z, entry = {
        "equal": (entry, entry),
        "opposite": (-entry, entry),
        "zero feature": (0 * entry, entry),
        "zero entry": (entry, 0 * entry),
        "both zero": (0 * entry, 0 * entry),
    }[name]
    assert gradient(z, entry, upstream, True).isfinite().all()
