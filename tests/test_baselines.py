"""What a reconstruction scores without having learned, against slow code that says the same."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from losses.baselines import REACH, best_constant, reconstruction_baselines


def huber(error):
    error = abs(error)
    return 0.5 * error**2 if error < 1 else error - 0.5


def voxels(shape):
    return itertools.product(*map(range, shape))


def slow_baselines(views, target, mask):
    """Everything by loops over voxels and blocks."""
    crops, channels, *size = views.shape
    grid = mask.shape[1:]
    block = [n // g for n, g in zip(size, grid)]
    fillings = {name: [] for name in ("visible_mean", "interpolation")}
    hidden = []
    for v, c in voxels((crops, channels)):
        seen = [b for b in voxels(grid) if not mask[(v, *b)]]
        means = {}
        for b in seen:
            inside = [tuple(b[a] * block[a] + i[a] for a in range(3)) for i in voxels(block)]
            means[b] = sum(views[(v, c, *i)] for i in inside) / len(inside)
        smooth = {}
        for b in voxels(grid):
            weights = [math.exp(-0.5 * sum((p - q) ** 2 for p, q in zip(b, other)) / REACH**2) for other in seen]
            smooth[b] = sum(w * means[other] for w, other in zip(weights, seen)) / sum(weights)
        for i in voxels(size):
            if not mask[(v, *(a // n for a, n in zip(i, block)))]:
                continue
            hidden.append(float(target[(v, c, *i)]))
            fillings["visible_mean"].append(sum(means.values()) / len(means))
            places = [min(max((a + 0.5) / n - 0.5, 0), g - 1) for a, n, g in zip(i, block, grid)]
            value = 0.0
            for corner in voxels((2, 2, 2)):
                weight, b = 1.0, []
                for place, high, g in zip(places, corner, grid):
                    share = place - math.floor(place)
                    weight *= share if high else 1 - share
                    b.append(min(math.floor(place) + high, g - 1))
                value += weight * smooth[tuple(b)]
            fillings["interpolation"].append(value)
    scores = {
        name: sum(huber(f - t) for f, t in zip(filled, hidden)) / len(hidden) for name, filled in fillings.items()
    }

    def of_constant(number):
        return sum(huber(number - t) for t in hidden) / len(hidden)

    best = minimize_scalar(of_constant, bounds=(min(hidden), max(hidden)), method="bounded", options={"xatol": 1e-9})
    return scores | {"constant": best.fun}


def baselines(views, target, mask, present=None):
    everything = torch.ones(views.shape[:2], dtype=torch.bool)
    return reconstruction_baselines(views, target, mask, everything if present is None else present)


def random_mask(rng, crops, grid, ratio=0.6):
    mask = np.zeros((crops, math.prod(grid)), bool)
    for row in mask:
        row[rng.permutation(len(row))[: int(ratio * len(row))]] = True
    return torch.from_numpy(mask.reshape(crops, *grid))


CASES = [  # crops, channels, blocks, voxels of a block
    (2, 1, (3, 3, 3), (2, 2, 2)),
    (1, 2, (2, 3, 4), (3, 2, 1)),
    (3, 1, (4, 1, 2), (1, 5, 3)),
    (1, 1, (2, 2, 3), (4, 1, 2)),
]


@pytest.mark.parametrize(("crops", "channels", "grid", "block"), CASES)
def test_they_are_what_loops_over_voxels_say(crops, channels, grid, block):
    rng = np.random.default_rng(0)
    shape = (crops, channels, *(g * b for g, b in zip(grid, block)))
    views = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    target = views + torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    mask = random_mask(rng, crops, grid)
    found = baselines(views, target, mask)
    expected = slow_baselines(views.numpy(), target.numpy(), mask.numpy())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
        assert found[name].shape == ()
        assert not found[name].requires_grad


def test_nothing_is_learned_from_what_is_hidden():
    rng = np.random.default_rng(1)
    views, mask = torch.from_numpy(rng.normal(size=(2, 1, 8, 8, 8))), random_mask(rng, 2, (4, 4, 4))
    target = views.clone()
    hidden = mask.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, None]
    before = baselines(views, target, mask)
    after = baselines(torch.where(hidden, 100.0, views), target, mask)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_ramp_is_interpolated_better_than_by_any_one_number():
    ramp = torch.linspace(-2, 2, 24).view(1, 1, 24, 1, 1).expand(2, 1, 24, 12, 18).contiguous()
    found = baselines(ramp, ramp, random_mask(np.random.default_rng(2), 2, (8, 4, 6)))
    assert found["interpolation"] < 0.3 * found["visible_mean"]
    assert found["constant"] <= found["visible_mean"]


def test_a_volume_of_one_value_is_filled_exactly():
    views = torch.full((2, 1, 12, 8, 6), 1.7)
    found = baselines(views, views, random_mask(np.random.default_rng(3), 2, (3, 4, 2)))
    assert all(float(value) == pytest.approx(0, abs=1e-10) for value in found.values())


def test_without_a_mask_all_voxels_count_as_in_the_loss():
    views = torch.from_numpy(np.random.default_rng(4).normal(size=(2, 1, 4, 4, 4)).astype(np.float32))
    nothing = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    found = baselines(views, views, nothing)
    mean = views.mean((2, 3, 4), keepdim=True)
    expected = torch.nn.functional.huber_loss(mean.expand_as(views), views)
    assert float(found["visible_mean"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_channel_that_is_missing_does_not_count():
    rng = np.random.default_rng(7)
    views = torch.from_numpy(rng.normal(size=(2, 2, 6, 6, 6)).astype(np.float32))
    mask, present = random_mask(rng, 2, (3, 3, 3)), torch.tensor([[True, False], [True, False]])
    alone = baselines(views[:, :1], views[:, :1], mask)
    together = baselines(views, views, mask, present)
    assert all(float(together[name]) == pytest.approx(float(alone[name]), rel=1e-6) for name in alone)


def test_a_crop_that_is_hidden_whole_is_filled_with_the_mean_of_a_volume():
    views = torch.from_numpy(np.random.default_rng(5).normal(size=(1, 1, 4, 4, 4)).astype(np.float32))
    found = baselines(views, views, torch.ones(1, 2, 2, 2, dtype=torch.bool))
    for name in ("visible_mean", "interpolation"):
        assert float(found[name]) == pytest.approx(
            float(torch.nn.functional.huber_loss(torch.zeros_like(views), views)), rel=1e-5
        )


@pytest.mark.parametrize("values", [[-10.0, -10.0, 10.0], [0.0, 0.2, 50.0], [3.0]])
def test_the_best_constant_is_not_beaten_by_any_other(values):
    target = torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1, 1)
    mask = torch.ones_like(target, dtype=torch.bool)
    best = float(best_constant(target, mask, torch.ones(1, 1, dtype=torch.bool)))

    def score(number):
        return sum(huber(number - value) for value in values)

    assert all(score(best) <= score(other) + 1e-9 for other in np.linspace(-12, 52, 500))


def test_they_know_no_gradient_and_no_precision_but_float32():
    views = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    found = baselines(views, views, random_mask(np.random.default_rng(6), 1, (2, 2, 2)))
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())
