"""The EMA quantizer: pure forward, exact straight-through, and a codebook that moves only in update()."""

from __future__ import annotations

import torch

from tokenizer import EMAQuantizer, Recipe
from tokenizer.kmeans import refine_entries, seed_entries

K, D = 8, 4


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(seed: int, shape: tuple[int, ...] = (6, D, 5, 5)) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def update(quantizer: EMAQuantizer, z: torch.Tensor, generator: torch.Generator | None = None) -> None:
    out = quantizer(z)
    quantizer.update(out.counts, out.sums, out.pool, generator or seeded())


def started(**options) -> EMAQuantizer:
    torch.manual_seed(0)
    quantizer = EMAQuantizer(K, D, Recipe(start_step=1, **options))
    update(quantizer, features(99))
    return quantizer


def buffers(quantizer: EMAQuantizer) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in quantizer.named_buffers()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_vectors_are_the_entries_and_gradients_pass_straight_through():
    quantizer = started()
    z = (features(1) * 1e3).requires_grad_()
    out = quantizer(z)
    assert torch.equal(out.vectors, quantizer.codebook[out.codes].permute(0, 3, 1, 2))  # bit for bit
    upstream = features(2)
    (gradient,) = torch.autograd.grad(out.vectors, z, upstream, retain_graph=True)
    assert torch.equal(gradient, upstream)
    (commitment,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(commitment, 0.25 * 2 * (z - out.vectors).detach() / z.numel())
    assert not quantizer.codebook.requires_grad


def test_shapes_dtypes_and_statistics():
    quantizer = started()
    z = features(3, (2, D, 3, 5))
    out = quantizer(z)
    assert out.codes.shape == (2, 3, 5)
    assert out.codes.dtype == torch.int64
    assert torch.equal(out.codes, quantizer.encode(z))
    rows, codes = z.permute(0, 2, 3, 1).reshape(-1, D), out.codes.flatten()
    one_hot = torch.nn.functional.one_hot(codes, K).float()
    torch.testing.assert_close(out.counts, one_hot.sum(0))
    torch.testing.assert_close(out.sums, one_hot.T @ rows)
    assert torch.equal(out.pool, rows)


def test_forward_is_pure_in_both_modes_and_update_moves():
    quantizer = started()
    before = buffers(quantizer)
    state = torch.get_rng_state()
    for mode in (True, False):
        first = quantizer.train(mode)(features(4))
        assert torch.equal(quantizer(features(4)).vectors, first.vectors)
        assert same(before, buffers(quantizer))
    assert torch.equal(state, torch.get_rng_state())
    update(quantizer, features(4))
    after = buffers(quantizer)
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "idle_updates")


def test_runs_in_float32_under_autocast():
    quantizer = started()
    z = features(5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, codes = quantizer(z), quantizer.encode(z)
    plain = quantizer(z)
    assert torch.equal(out.vectors, plain.vectors)
    assert torch.equal(out.codes, plain.codes)
    assert torch.equal(codes, plain.codes)
    assert out.sums.dtype == torch.float32


def test_features_pass_unquantized_only_while_training_before_the_start():
    quantizer = EMAQuantizer(K, D, Recipe(start_step=3))
    z = features(6)
    for _ in range(2):
        out = quantizer.train()(z)
        assert torch.equal(out.vectors, z)
        assert out.loss == 0
        assert not torch.equal(quantizer.eval()(z).vectors, z)
        codebook = quantizer.codebook.clone()
        update(quantizer, z)
        assert torch.equal(quantizer.codebook, codebook)
    out = quantizer.train()(z)  # still before update 3
    assert torch.equal(out.vectors, z)
    update(quantizer, z)
    out = quantizer(z)
    assert torch.equal(out.vectors, quantizer.decode(out.codes))
    assert out.loss > 0


def test_starts_with_one_entry_in_each_cluster():
    centres = 10 * torch.randn(K, D, generator=seeded(1))
    points = centres.repeat_interleave(20, 0) + 0.01 * torch.randn(20 * K, D, generator=seeded(2))
    quantizer = EMAQuantizer(K, D, Recipe(start_step=1))
    update(quantizer, points.T.reshape(1, D, 20, K))
    assert torch.cdist(centres, quantizer.codebook).min(dim=1).values.max() < 0.05
    assert quantizer.ema_counts.min() == quantizer.ema_counts.max()


def test_seeding_never_draws_a_taken_point_while_others_are_left():
    points = torch.cat([torch.zeros(1000, 2), torch.eye(2), -torch.eye(2)])  # almost all equal, as in flat images
    drawn = seed_entries(points, 5, seeded(3))
    assert len(drawn.unique(dim=0)) == 5
    others = seed_entries(points, 4, seeded(4), known=torch.zeros(1, 2))
    assert not (others == 0).all(dim=1).any()
    assert seed_entries(points[:2], 3, seeded(5)).shape == (3, 2)  # all equal: drawn twice rather than failing
    values = torch.randn(300, 4, generator=seeded(7))
    many = values.repeat_interleave(8, dim=0)  # in one round, equal points are drawn once
    many[:1200] = 5.0
    entries = seed_entries(many, 140, seeded(8), known=torch.zeros(400, 4))
    assert len(torch.unique(entries, dim=0)) == 140
    assert seed_entries(points, 0, seeded(6)).shape == (0, 2)


def test_refining_lowers_distortion_and_keeps_entries_without_points():
    points = torch.randn(300, 2, generator=seeded(7))
    entries = torch.cat([points[:5], torch.full((1, 2), 100.0)])
    refined, counts, sums = refine_entries(points, entries, 10)
    assert (
        torch.cdist(points, refined).min(1).values.square().sum()
        < torch.cdist(points, entries).min(1).values.square().sum()
    )
    assert torch.equal(refined[5], entries[5])
    assert counts[5] == 0
    assert counts.sum() == 300
    torch.testing.assert_close(sums.sum(0), points.sum(0))


def test_moving_average_equals_a_slow_unbiased_reference():
    decay = 0.9
    quantizer = started(ema_decay=decay, revive_fraction=0.0)
    weights, observations = (
        [1.0],
        [(quantizer.ema_counts.double() / (1 - decay), quantizer.ema_sums.double() / (1 - decay))],
    )
    for seed in range(12):
        out = quantizer(features(seed))
        quantizer.update(out.counts, out.sums, out.pool, seeded())
        weights = [decay * weight for weight in weights] + [1.0]
        observations.append((out.counts.double(), out.sums.double()))
        counts = sum(w * c for w, (c, _) in zip(weights, observations, strict=True)) / sum(
            weights
        )  # unbiased: weights sum to one
        sums = sum(w * s for w, (_, s) in zip(weights, observations, strict=True)) / sum(weights)
        torch.testing.assert_close(quantizer.codebook.double(), sums / counts[:, None], rtol=1e-4, atol=1e-5)


def test_revival_resets_vector_count_and_sum():
    quantizer = started()
    with torch.no_grad():
        quantizer.ema_counts[3] = 1e-3
        quantizer.ema_sums[3] = 1e3 * quantizer.ema_counts[3]
        quantizer.codebook[3] = 1e3
    z = features(8)
    out = quantizer(z)
    assert out.counts[3] == 0
    kept = EMAQuantizer(K, D, Recipe(start_step=1, revive_fraction=0.0))
    kept.load_state_dict(quantizer.state_dict())
    quantizer.update(out.counts, out.sums, out.pool, seeded())
    assert (out.pool == quantizer.codebook[3]).all(dim=1).any()
    torch.testing.assert_close(quantizer.ema_sums[3], quantizer.codebook[3] * quantizer.ema_counts[3])
    kept.update(out.counts, out.sums, out.pool, seeded())
    torch.testing.assert_close(quantizer.ema_counts[3], kept.ema_counts.mean())
    torch.testing.assert_close(kept.codebook[3], torch.full((D,), 1e3))  # without revival it stays where it was
    others = torch.arange(K) != 3
    assert torch.equal(kept.codebook[others], quantizer.codebook[others])


def test_equal_arguments_give_equal_bits_and_the_generator_matters():
    def run(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        quantizer, generator = EMAQuantizer(K, D, Recipe(start_step=2, revive_fraction=0.5)), seeded(seed)
        for step in range(6):
            update(quantizer, features(step), generator)
        return buffers(quantizer)

    assert same(run(0), run(0))
    assert not same(run(0), run(1))


def test_resumes_exactly_from_its_state():
    first, generator = started(revive_fraction=0.5), seeded(1)
    update(first, features(1), generator)
    second, copied = EMAQuantizer(K, D, Recipe(start_step=1, revive_fraction=0.5)), torch.Generator()
    second.load_state_dict(first.state_dict())
    copied.set_state(generator.get_state())
    for step in range(5):
        update(first, features(step), generator)
        update(second, features(step), copied)
    assert same(buffers(first), buffers(second))


def test_pool_is_bounded_and_spread_over_the_grid():
    quantizer = EMAQuantizer(K, D, Recipe(pool_size=128))
    z = torch.arange(16).float().expand(1, D, 16, 16)  # the value is the column
    pool = quantizer(z).pool
    assert pool.shape == (128, D)
    assert len(pool[:, 0].unique()) == 16


def test_sorting_puts_the_most_used_first_and_moves_everything_together():
    quantizer = started()
    for seed in range(3):
        update(quantizer, features(seed))
    z = features(9)
    before = quantizer(z)
    quantizer.sort_by_usage()
    after = quantizer(z)
    assert (quantizer.ema_counts.diff() <= 0).all()
    assert torch.equal(before.vectors, after.vectors)
    torch.testing.assert_close(quantizer.codebook, quantizer.ema_sums / quantizer.ema_counts[:, None])
