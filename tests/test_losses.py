"""Losses against slow, obvious code."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import losses.ntxent
from losses.cells import sample_cells
from losses.consistency import CONSISTENCIES, AlignedCells, cell_contrast, cosine_consistency, gram_consistency
from losses.cva import cell_retrieval, cva_objective, watch_cells
from losses.ntxent import nt_xent
from losses.reconstruction import masked_huber


def alone(tensor):
    """`gather` of a single rank."""
    return tensor[None]


def slow_nt_xent(student, teacher, groups, temperature):
    """Loss and success of each student row, averaged with its teacher row's."""
    rows = [(s / s.norm(), g) for s, g in zip(student, groups)] + [(t / t.norm(), g) for t, g in zip(teacher, groups)]
    n, found = len(student), []
    for i, (anchor, group) in enumerate(rows):
        positive = float(anchor @ rows[(i + n) % (2 * n)][0]) / temperature
        negatives = [float(anchor @ other) / temperature for other, owner in rows if owner not in (group, -1)]
        loss = -positive + math.log(sum(math.exp(x) for x in [positive, *negatives]))
        found.append((loss, all(positive > x for x in negatives)))
    return [[(found[i][k] + found[i + n][k]) / 2 for i in range(n)] for k in (0, 1)]


# --------------------------------------------------------------------------- image-level contrast


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 7, 10**6])
def test_nt_xent_equals_loops(count, block, monkeypatch):
    monkeypatch.setattr(losses.ntxent, "SIMILARITIES", block * 4 * count)
    torch.manual_seed(count)
    student, teacher = torch.randn(2, 2 * count, 7, dtype=torch.double)
    volumes = torch.arange(count).repeat(2)
    loss, nearest = nt_xent(student, teacher, volumes, 0.5, alone)
    expected, hits = slow_nt_xent(student, teacher, volumes.tolist(), 0.5)
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert nearest.tolist() == pytest.approx(hits)
    if count == 1:
        assert loss.abs().max() == 0  # no other volume, no negatives


def test_nt_xent_has_the_published_number_of_negatives():
    """With all rows alike, each anchor's loss is log(1 + negatives): 4B - 4 of them for B volumes."""
    rows = torch.ones(10, 3)
    loss, _ = nt_xent(rows, rows, torch.arange(5).repeat(2), 0.5, alone)
    torch.testing.assert_close(loss, torch.full((10,), math.log(1 + 4 * 5 - 4)))


@pytest.mark.parametrize("block", [1, 10**6])
def test_nt_xent_gradient(block, monkeypatch):
    monkeypatch.setattr(losses.ntxent, "SIMILARITIES", block)
    student, teacher = torch.randn(2, 6, 4, dtype=torch.double).unbind()
    rows = student.requires_grad_(), teacher.requires_grad_()
    assert gradcheck(lambda s, t: nt_xent(s, t, torch.arange(3).repeat(2), 0.5, alone)[0], rows)
    assert gradcheck(lambda s: nt_xent(s, None, torch.arange(3).repeat(2), 0.5, alone)[0], rows[0])


def test_nt_xent_uses_its_temperature():
    rows, objective = torch.randn(2, 6, 4), cva_objective("none", 0.1)
    pair = torch.arange(3).repeat(2)
    outputs = {"student_embedding": rows[0], "teacher_embedding": rows[1].roll(3, 0), "group": pair}
    expected = nt_xent(rows[0], rows[1], pair, 0.1, alone)[0].mean()
    torch.testing.assert_close(objective(outputs, alone)["contrastive"], expected)
    assert (nt_xent(rows[0], rows[1], pair, 0.5, alone)[0].mean() - expected).abs() > 0.1


def test_without_a_teacher_it_is_simclr():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(8, 5, dtype=torch.double), dim=1)
    loss, _ = nt_xent(rows, None, torch.arange(4).repeat(2), 0.5, alone)
    for i, row in enumerate(rows):  # eq. 1: the sum runs over all other rows
        terms = [math.exp(float(row @ other) / 0.5) for k, other in enumerate(rows) if k != i]
        positive = math.exp(float(row @ rows[(i + 4) % 8]) / 0.5)
        assert loss[i].item() == pytest.approx(-math.log(positive / sum(terms)), abs=1e-12)


# --------------------------------------------------------------------------- dense consistency


def cells(volumes=2, places=5, channels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2 * volumes, places, channels, dtype=torch.double, generator=generator)
    inside = torch.rand(volumes, places, generator=generator) < 0.7
    return student, teacher, inside.repeat(2, 1), torch.arange(volumes).repeat(2) + 100


def value(consistency, *aligned):
    return consistency(AlignedCells(*aligned), alone, 0.5)


@pytest.mark.parametrize("name", [name for name in CONSISTENCIES if name != "none"])
def test_consistency_gradient(name):
    student, teacher, inside, pair = cells()
    student.requires_grad_(), teacher.requires_grad_()
    assert gradcheck(lambda s, t: value(CONSISTENCIES[name].function, s, t, inside, pair), (student, teacher))


@pytest.mark.parametrize("name", [name for name in CONSISTENCIES if name != "none"])
def test_cells_outside_a_view_do_not_count(name):
    student, teacher, inside, pair = cells()
    other = [torch.where(inside[..., None], rows, torch.randn_like(rows)) for rows in (student, teacher)]
    loss = value(CONSISTENCIES[name].function, student, teacher, inside, pair)
    torch.testing.assert_close(value(CONSISTENCIES[name].function, *other, inside, pair), loss)
    nothing = value(CONSISTENCIES[name].function, student, teacher, torch.zeros_like(inside), pair)
    assert nothing.item() == 0


def test_cosine_equals_loops():
    student, teacher, inside, pair = cells()
    crops = []
    for s, t, reached in zip(student, teacher, inside):
        values = [2 - 2 * float(a @ b / a.norm() / b.norm()) for a, b, r in zip(s, t, reached) if r]
        crops.append(sum(values) / len(values) if values else 0)
    assert value(cosine_consistency, student, teacher, inside, pair).item() == pytest.approx(sum(crops) / len(crops))
    assert value(cosine_consistency, student, 3 * student, inside, pair).item() == pytest.approx(0, abs=1e-12)
    assert value(cosine_consistency, student, -student, inside, pair).item() == pytest.approx(4)


@pytest.mark.parametrize("block", [3, 10**6])
def test_cell_contrast_equals_loops(block, monkeypatch):
    monkeypatch.setattr(losses.ntxent, "SIMILARITIES", block * 40)
    student, teacher, inside, pair = cells()
    names = itertools.product(pair.tolist(), range(inside.shape[1]))  # rows of one volume and cell are one group
    groups = [name if reached else -1 for name, reached in zip(names, inside.flatten().tolist())]
    expected, _ = slow_nt_xent(student.flatten(0, 1), teacher.flatten(0, 1), groups, 0.5)
    expected = torch.tensor(expected).view(inside.shape)
    per_crop = [row[reached].mean() if reached.any() else torch.tensor(0.0) for row, reached in zip(expected, inside)]
    loss = value(cell_contrast, student, teacher, inside, pair)
    assert loss.item() == pytest.approx(float(sum(per_crop)) / len(per_crop), rel=1e-6)


def test_gram_equals_loops():
    student, teacher, inside, pair = cells()
    crops = []
    for s, t, reached in zip(student, teacher, inside):
        gram = torch.zeros(6, 6, dtype=torch.double)
        for a, b, r in zip(s, t, reached):
            if r:
                gram += torch.outer(a, a) / (a @ a) - torch.outer(b, b) / (b @ b)
        crops.append((gram * len(reached) / reached.sum()).square().mean())
    torch.testing.assert_close(value(gram_consistency, student, teacher, inside, pair), torch.stack(crops).mean())


def test_shuffled_cells_change_the_cosine_and_c_cva_but_not_gram():
    student, _, _, pair = cells(places=27)
    inside = torch.ones(4, 27, dtype=torch.bool)
    shuffled = student[:, torch.randperm(27, generator=torch.Generator().manual_seed(0))]
    assert value(cosine_consistency, student, shuffled, inside, pair) > 1
    contrast = [value(cell_contrast, student, rows, inside, pair) for rows in (shuffled, student)]
    assert contrast[0] > 1.2 * contrast[1]
    assert value(gram_consistency, student, shuffled, inside, pair).item() == pytest.approx(0, abs=1e-20)


# --------------------------------------------------------------------------- reading cells


@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 2, 6)])
def test_sampled_cells_equal_grid_sample_and_a_mean(grid):
    torch.manual_seed(0)
    crop_size = tuple(8 * n for n in grid)
    features = torch.randn(2, 3, *grid, dtype=torch.double)
    points = torch.rand(2, 7, 4, 3) * (torch.tensor(crop_size) + 4) - 2  # also beyond the border
    sampled = sample_cells(features, points, crop_size)
    normalised = (points.double() + 0.5) * 2 / torch.tensor(crop_size) - 1
    expected = F.grid_sample(features, normalised.flip(-1)[:, :, :, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(sampled, expected[..., 0].mean(-1).mT, atol=1e-5, rtol=0)


def test_sampled_cells_gradient():
    points = torch.rand(1, 4, 2, 3) * torch.tensor([23.0, 31.0, 39.0])
    features = torch.randn(1, 2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    assert gradcheck(lambda f: sample_cells(f, points, (24, 32, 40)), features)


def test_half_precision_features_are_averaged_in_full():
    features = torch.randn(1, 8, 4, 4, 4).bfloat16()
    points = torch.rand(1, 5, 8, 3) * 31
    out = sample_cells(features, points, (32, 32, 32))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, sample_cells(features.float(), points, (32, 32, 32)))


def test_retrieval_counts_cells_whose_nearest_is_the_same_place():
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(2, 50, 16), dim=-1)
    everywhere = torch.ones(2, 50, dtype=torch.bool)
    assert cell_retrieval(rows, rows, everywhere) == 1
    assert cell_retrieval(rows, rows.roll(1, dims=1), everywhere) == 0
    some = everywhere.clone()
    some[:, 30:] = False
    mixed = torch.where(some[..., None], rows, rows.roll(1, dims=1))
    assert cell_retrieval(rows, mixed, some) == 1
    assert cell_retrieval(rows, torch.randn(2, 50, 16), everywhere) < 0.2
    decoy = rows.clone()
    decoy[:, :20] = F.normalize(rows[:, :20] + 0.3 * rows[:, 30:], dim=-1)  # nearest to itself, but for one outside
    decoy[:, 30:] = rows[:, :20]
    assert cell_retrieval(rows, decoy, some) == 1
    assert cell_retrieval(rows, decoy, everywhere) < 1


def test_monitors_are_of_cells_inside():
    torch.manual_seed(0)
    rows, inside = torch.randn(2, 50, 16), torch.rand(2, 50) < 0.5
    changed = torch.where(inside[..., None], rows, torch.ones(16))
    for name, value in watch_cells(rows, rows, inside).items():
        torch.testing.assert_close(watch_cells(changed, changed, inside)[name], value)
    variance = F.normalize(rows, dim=-1)[inside].var(dim=0, correction=0)
    torch.testing.assert_close(watch_cells(rows, rows, inside)["feature_variance"], variance.sum())


# --------------------------------------------------------------------------- reconstruction, and all together


THERE = torch.ones(2, 1, dtype=torch.bool)


def test_huber_looks_at_masked_voxels_only():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 2, 1, 4, 4, 4) * 2
    mask = torch.rand(2, 1, 4, 4, 4) < 0.5
    errors = []
    for p, t, hidden in zip(prediction.flatten(), target.flatten(), mask.flatten()):
        if hidden:
            e = abs(float(p - t))
            errors.append(0.5 * e * e if e < 1 else e - 0.5)
    assert masked_huber(prediction, target, mask, THERE).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    changed = torch.where(mask, prediction, prediction + 9)
    assert masked_huber(changed, target, mask, THERE) == masked_huber(prediction, target, mask, THERE)


def test_huber_leaves_out_channels_that_are_missing():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 4, 4, 4)
    mask, present = torch.rand(2, 1, 4, 4, 4) < 0.5, torch.tensor([[True, False, True], [False, True, True]])
    for hidden in (mask, torch.zeros_like(mask)):
        counts = (hidden | ~hidden.any()).expand_as(target) & present[..., None, None, None]
        expected = F.huber_loss(prediction[counts], target[counts])
        torch.testing.assert_close(masked_huber(prediction, target, hidden, present), expected)


def test_an_autoencoder_is_scored_everywhere():
    prediction, target = torch.randn(2, 2, 1, 4, 4, 4)
    none = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    assert masked_huber(prediction, target, none, THERE) == masked_huber(prediction, target, ~none, THERE)


def test_each_crop_faces_the_other_view_of_its_volume():
    """Teacher features that are the student's of the other view agree perfectly; of the same view, not at all."""
    torch.manual_seed(0)
    dense = torch.randn(6, 8, 4, 4, 4)
    outputs = {
        "target": torch.zeros(6, 1, 32, 32, 32),
        "points": (torch.rand(1, 9, 8, 3) * 31).expand(6, -1, -1, -1),
        "inside": torch.ones(6, 9, dtype=torch.bool),
        "present": torch.ones(6, 1, dtype=torch.bool),
        "pair": torch.arange(3).repeat(2),
        "group": torch.arange(3).repeat(2),
        "student_dense": dense,
        "student_embedding": dense.mean((2, 3, 4)),
    }
    facing = {"teacher_dense": dense.roll(3, 0), "teacher_embedding": outputs["student_embedding"].roll(3, 0)}
    objective = cva_objective("cosine", 0.5)
    agreed = objective(outputs | facing, alone)
    assert agreed["consistency"].item() == pytest.approx(0, abs=1e-6)
    assert agreed["retrieval"] == 1
    assert agreed["contrastive_accuracy"] == 1
    own = {"teacher_dense": dense, "teacher_embedding": outputs["student_embedding"]}
    assert objective(outputs | own, alone)["consistency"] > 1
