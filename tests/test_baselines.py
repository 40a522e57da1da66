"""What scores without having learned anything, against slow and obvious code."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch.nn import functional as F

from losses.baselines import reconstruction_baselines

BLOCK = (4, 2, 3)
GRID = (3, 4, 2)
SIZE = tuple(n * b for n, b in zip(GRID, BLOCK))


def crops(seed, count=3, channels=2):
    """Views, another target, and masks that hide most blocks."""
    rng = np.random.default_rng(seed)
    views, target = rng.normal(1.0, 2.0, size=(2, count, channels, *SIZE))
    mask = rng.random((count, *GRID)) < 0.7
    mask[:, 0, 0, 0], mask[:, -1, -1, -1] = False, True
    return views, target, mask


def huber(difference):
    size = np.abs(difference)
    return np.where(size < 1, size**2 / 2, size - 0.5)


def whole(mask):
    for axis, block in enumerate(BLOCK):
        mask = mask.repeat(block, axis=axis)
    return mask


def interpolated(crop, mask):
    """One channel `[X, Y, Z]`: block by block, then by torch's own upsampling."""
    means = crop.reshape(GRID[0], BLOCK[0], GRID[1], BLOCK[1], GRID[2], BLOCK[2]).mean((1, 3, 5))
    smooth = np.zeros(GRID)
    for place in itertools.product(*map(range, GRID)):
        total = weight = 0.0
        for other in itertools.product(*map(range, GRID)):
            if not mask[other]:
                near = math.exp(-(math.dist(place, other) ** 2) / 2)
                total, weight = total + near * means[other], weight + near
        smooth[place] = total / weight
    grid = torch.from_numpy(smooth)[None, None]
    return F.interpolate(grid, size=SIZE, mode="trilinear", align_corners=False)[0, 0].numpy()


@pytest.mark.parametrize("seed", [0, 1])
def test_baselines_are_their_words(seed):
    views, target, mask = crops(seed)
    found = reconstruction_baselines(*map(torch.from_numpy, (views, target, mask)))
    hidden = np.stack([np.broadcast_to(whole(m), target.shape[1:]) for m in mask])
    visible_mean, interpolation = np.zeros_like(target), np.zeros_like(target)
    for i, c in itertools.product(range(len(views)), range(views.shape[1])):
        visible_mean[i, c] = views[i, c][~whole(mask[i])].mean()
        interpolation[i, c] = interpolated(views[i, c], mask[i])
    best = optimize.minimize_scalar(lambda constant: huber(target[hidden] - constant).mean()).fun
    assert found["constant"].item() == pytest.approx(best, rel=1e-4)
    assert found["visible_mean"].item() == pytest.approx(huber(target - visible_mean)[hidden].mean(), rel=1e-4)
    assert found["interpolation"].item() == pytest.approx(huber(target - interpolation)[hidden].mean(), rel=1e-4)


def test_what_is_hidden_is_not_seen():
    views, target, mask = crops(2)
    changed = np.where(np.stack([whole(m) for m in mask])[:, None], 100.0, views)
    first, second = (reconstruction_baselines(*map(torch.from_numpy, (v, target, mask))) for v in (views, changed))
    assert first == second


def test_a_ramp_is_interpolated_and_a_constant_rebuilt():
    mask = torch.from_numpy(crops(3, count=2)[2])
    flat = torch.full((2, 1, *SIZE), 0.7)
    assert all(loss < 1e-10 for loss in reconstruction_baselines(flat, flat, mask).values())
    ramp = torch.linspace(-2, 2, SIZE[0]).view(1, 1, -1, 1, 1).expand(2, 1, *SIZE).contiguous()
    scores = reconstruction_baselines(ramp, ramp, mask)
    assert scores["interpolation"] < scores["visible_mean"]
