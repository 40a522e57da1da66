"""Losses against slow, obvious code."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from losses.consistency import cosine_consistency, sample_cells
from losses.ntxent import nt_xent
from losses.reconstruction import masked_huber


def slow_nt_xent(student, teacher, volumes, temperature):
    rows = [(t / t.norm(), v) for t, v in zip(teacher, volumes)] + [(s / s.norm(), v) for s, v in zip(student, volumes)]
    n, losses, hits = len(student), [], []
    for i, (anchor, volume) in enumerate(rows):
        positive = float(anchor @ rows[(i + n) % (2 * n)][0]) / temperature
        negatives = [float(anchor @ other) / temperature for other, owner in rows if owner != volume]
        losses.append(-positive + math.log(sum(math.exp(x) for x in [positive, *negatives])))
        hits.append(all(positive > x for x in negatives))
    return sum(losses) / len(losses), sum(hits) / len(hits)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_nt_xent_equals_loops(count):
    torch.manual_seed(count)
    student, teacher = torch.randn(2, 2 * count, 7, dtype=torch.double)
    volumes = torch.arange(count).repeat(2)
    loss, accuracy = nt_xent(student, teacher, volumes, 0.5)
    expected, hits = slow_nt_xent(student, teacher, volumes.tolist(), 0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert accuracy.item() == pytest.approx(hits)
    if count == 1:
        assert loss.item() == 0  # no other volume, no negatives


def test_nt_xent_gradient():
    student, teacher = torch.randn(2, 6, 4, dtype=torch.double, requires_grad=True)
    assert gradcheck(lambda s, t: nt_xent(s, t, torch.arange(3).repeat(2), 0.5)[0], (student, teacher))


def test_huber_looks_at_masked_voxels_only():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 2, 1, 4, 4, 4) * 2
    mask = torch.rand(2, 1, 4, 4, 4) < 0.5
    errors = []
    for p, t, hidden in zip(prediction.flatten(), target.flatten(), mask.flatten()):
        if hidden:
            e = abs(float(p - t))
            errors.append(0.5 * e * e if e < 1 else e - 0.5)
    assert masked_huber(prediction, target, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    changed = torch.where(mask, prediction, prediction + 9)
    assert masked_huber(changed, target, mask) == masked_huber(prediction, target, mask)


def test_cosine_consistency():
    features = torch.randn(2, 16, 3, 3, 3)
    assert cosine_consistency(features, 3 * features).item() == pytest.approx(0, abs=1e-6)
    assert cosine_consistency(features, -features).item() == pytest.approx(4, abs=1e-6)
    shuffled = features.flatten(2)[..., torch.randperm(27)].view_as(features)
    assert cosine_consistency(shuffled, features) > 1  # position matters


def test_sampled_cells_have_gradient():
    features = torch.randn(1, 2, 3, 4, 5, dtype=torch.double).float().requires_grad_()
    points = torch.rand(1, 4, 4, 4, 3) * torch.tensor([23.0, 31.0, 39.0])
    sample_cells(features, points, (24, 32, 40), 2).square().sum().backward()
    assert features.grad.abs().sum() > 0
