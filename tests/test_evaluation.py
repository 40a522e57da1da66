"""What a frozen encoder is worth: scores, probes, retrieval, spread; against slow, obvious code and planted truths."""

import json
import math

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import save_nifti
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist

from benchmarks import evaluate_encoder
from evaluation import dense_probe, scores
from evaluation.dense_probe import (
    Case,
    class_shares,
    dense_cells,
    knn_probe,
    linear_probe,
    number_labels,
    place_cells,
    raw_cells,
    split_by_subject,
)
from evaluation.pooled_probe import pooled_neighbours, pooled_probe, pooled_regression, pooled_scores
from evaluation.retrieval import read_cells, retrieval, transport
from evaluation.scores import dice, segmentation_scores
from evaluation.spread import rank_me
from models import build_encoder
from training.command_line import is_for_the_user

SPACING = (1.0, 2.0, 0.5)


def ball(shape, centre, radius) -> torch.Tensor:
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"), dim=-1)
    return ((grid - torch.tensor(centre)).norm(dim=-1) <= radius).long()


def test_labels_are_numbered_and_zero_is_the_background_even_where_none_is():
    first, second = number_labels([torch.tensor([[170, 85]]), torch.tensor([[85, 85]])])
    assert first.tolist() == [[2, 1]]
    assert second.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match="nothing but background"):
        number_labels([torch.zeros(2, 2, dtype=torch.long)])


def test_a_subject_is_on_one_side_alone():
    subjects = [f"s{number // 2}" for number in range(8)]  # two volumes each
    pool, tested = split_by_subject(subjects, 3)
    assert sorted([*pool, *tested]) == list(range(8))
    assert len(tested) == 4
    assert not {subjects[n] for n in pool} & {subjects[n] for n in tested}
    with pytest.raises(ValueError, match="leave none to learn from"):
        split_by_subject(subjects, 7)


def test_dice_is_that_of_sets():
    generator = torch.Generator().manual_seed(0)
    true, predicted = (torch.randint(0, 4, (7, 8, 9), generator=generator) for _ in range(2))
    for label, value in enumerate(dice(predicted, true, 4).tolist(), start=1):
        both = ((true == label) & (predicted == label)).sum()
        assert value == pytest.approx(float(2 * both / ((true == label).sum() + (predicted == label).sum())))


def test_surface_scores_are_in_mm():
    true, predicted = ball((20, 16, 24), (9.0, 8.0, 11.0), 5), ball((20, 16, 24), (11.0, 8.0, 11.0), 5)
    found = segmentation_scores(predicted, true, 2, SPACING, tolerance=1.0)
    edges = [
        np.argwhere(mask & ~binary_erosion(mask)) * SPACING for mask in (true.bool().numpy(), predicted.bool().numpy())
    ]
    far = cdist(*edges)
    expected = max(np.percentile(far.min(axis), 95) for axis in (0, 1))
    assert float(found["hd95"]) == pytest.approx(expected, abs=1e-4)
    same = segmentation_scores(true, true, 2, SPACING)
    assert [float(same[name]) for name in ("dice", "nsd", "hd95")] == [1.0, 1.0, 0.0]
    assert float(segmentation_scores(predicted, true, 2, SPACING, tolerance=2.01)["nsd"]) == 1.0  # the shift in mm
    assert float(found["nsd"]) < 0.95
    touching = torch.zeros(20, 16, 24, dtype=torch.long)
    touching[:5] = 1  # a structure that ends with the image
    assert float(segmentation_scores(touching, touching, 2, SPACING)["nsd"]) == 1.0


def test_what_is_not_there_has_no_score_and_what_is_missed_the_worst():
    true, predicted = torch.zeros(8, 8, 8, dtype=torch.long), torch.zeros(8, 8, 8, dtype=torch.long)
    true[2:4], predicted[5:6] = 1, 2  # 1 missed, 2 invented, 3 nowhere
    found = segmentation_scores(predicted, true, 4, SPACING)
    diagonal = math.dist((0, 0, 0), np.multiply(SPACING, 8))
    worst = {"dice": 0.0, "nsd": 0.0, "hd95": diagonal}
    for name, values in found.items():
        assert values[:2].tolist() == pytest.approx([worst[name]] * 2)
        assert values[2].isnan()
    with pytest.raises(ValueError, match="no score"):
        segmentation_scores(predicted[1:], true, 4, SPACING)


def test_an_interval_has_the_mean_and_narrows_with_cases():
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    few, many = scores.mean_over_cases(values[:25]), scores.mean_over_cases([*values, float("nan")])
    assert many.value == pytest.approx(values.mean())
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert few.high - few.low > 2 * (many.high - many.low)
    assert scores.mean_over_cases(values) == scores.mean_over_cases(values)
    assert math.isnan(scores.mean_over_cases([float("nan")]).value)


def test_a_difference_is_told_from_none():
    rng = np.random.default_rng(0)
    first = rng.normal(0.7, 0.1, 40)
    assert scores.paired_test(first, first + rng.normal(0.05, 0.02, 40)) < 1e-3
    assert scores.paired_test(first, first) == 1.0
    false = [scores.paired_test(first, first + rng.normal(0, 0.1, 40), seed) < 0.05 for seed in range(100)]
    assert np.mean(false) < 0.15
    with pytest.raises(ValueError, match="same ones"):
        scores.paired_test(first, first[1:])


def test_holm_corrects_for_the_number_of_tests():
    found = scores.holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.09, "b": 0.04, "c": 0.09, "d": 0.9})
    assert list(found) == ["a", "b", "c", "d"]


def test_scores_of_whole_volumes(monkeypatch):
    monkeypatch.setattr(scores, "DRAWS_OF_METRICS", 50)
    classes = np.array([0] * 30 + [1] * 10)
    chance = scores.classification_scores(np.tile([0.9, 0.1], (40, 1)), classes)
    assert chance["balanced_accuracy"].value == chance["auroc"].value == 0.5
    assert chance["ap"].value == 0.25
    perfect = scores.classification_scores(np.eye(3)[np.arange(30) % 3], np.arange(30) % 3)
    assert all(found == (1.0, 1.0, 1.0) for found in perfect.values())
    age = np.linspace(20, 80, 31)
    found = scores.regression_scores(age + 3, age)
    assert found["mae"] == pytest.approx((3, 3, 3))
    assert scores.regression_scores(np.full(31, 50.0), age)["r2"].value == pytest.approx(0)


def structures(seed: int, shape=(34, 30, 27)) -> torch.Tensor:
    """Two structures at random places, larger than a cell."""
    rng = np.random.default_rng(seed)
    labels = ball(shape, rng.uniform(8, 12, 3), 6)
    return torch.where(ball(shape, (shape[0] - 10.0, *rng.uniform(10, 18, 2)), 7).bool(), 2, labels)


def planted(seed: int, noise: float, channels=12) -> Case:
    """Features in which the shares of the classes are linear, in directions that all volumes share."""
    labels = structures(seed)
    directions = torch.randn(channels, 3, generator=torch.Generator().manual_seed(0))
    shares = torch.einsum("dk,kxyz->dxyz", directions, class_shares(labels, 4, 3))
    return Case(shares + noise * torch.randn(shares.shape, generator=torch.Generator().manual_seed(seed)), labels, 4)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
@pytest.mark.parametrize("labelled", [1, 3])
def test_a_probe_finds_what_is_there_and_nothing_in_noise(probe, labelled):
    train, test = ([planted(seed, 0.2) for seed in seeds] for seeds in (range(labelled), (20, 21)))
    predicted = probe(train, test, 3)
    assert [labels.shape for labels in predicted] == [case.labels.shape for case in test]
    least = 0.5 if probe is knn_probe and labelled == 1 else 0.8  # nothing to choose by how much rare classes count
    assert min(float(dice(found, case.labels, 3).min()) for found, case in zip(predicted, test)) > least
    noise = [[case._replace(cells=torch.randn_like(case.cells)) for case in cases] for cases in (train, test)]
    found = torch.stack([dice(labels, case.labels, 3) for labels, case in zip(probe(*noise, 3), test)])
    assert float(found.mean()) < 0.35
    assert all(torch.equal(a, b) for a, b in zip(predicted, probe(train, test, 3)))


def test_a_useless_channel_a_scale_or_an_offset_changes_little():
    train, test = ([planted(seed, 0.2) for seed in seeds] for seeds in ((0, 1, 2), (20,)))
    other = [
        [c._replace(cells=torch.cat((1e4 + 1e3 * c.cells, torch.full_like(c.cells[:1], 7.0)))) for c in cases]
        for cases in (train, test)
    ]
    (one,), (two,) = linear_probe(train, test, 3), linear_probe(*other, 3)
    assert (one == two).float().mean() > 0.99


def test_the_regression_is_at_its_minimum():
    """Against autograd: the gradient of the penalised error vanishes."""
    case = planted(0, 1.0)
    rows, targets = case.rows(), case.shares(3)
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
    weights, _ = dense_probe.fit_logistic(rows, targets, [len(rows)])
    weights.requires_grad_()
    error = torch.nn.functional.cross_entropy(rows @ weights[:-1] + weights[-1], targets)
    error = error + dense_probe.STRENGTH_OF_ONE / 2 * weights[:-1].square().sum()
    (gradient,) = torch.autograd.grad(error, weights)
    assert gradient.abs().max() < 1e-3


def test_cells_lie_where_their_voxels_are():
    """Coordinate fields: a cell's mean is its centre, and interpolation brings back each voxel's own coordinate."""
    shape, stride = (24, 20, 14), 4
    field = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))
    cells = raw_cells(field, stride)[13 * 6 : 13 * 6 + 3]  # the means of the middle one of 27 neighbours
    assert cells.shape == (3, 6, 5, 4)
    assert cells[:, 2, 1, 0].tolist() == [9.5, 5.5, 1.5]
    assert float(cells[2, 0, 0, 3]) == 12.5  # the last cell has two voxels alone
    voxels = dense_probe.to_voxels(cells[:2], stride, shape)
    inner = (slice(None), slice(2, -2), slice(2, -2), slice(2, -2))
    torch.testing.assert_close(voxels[inner], field[:2][inner])
    place = place_cells(field, stride)
    torch.testing.assert_close(
        place[:2] * torch.tensor([24, 20]).view(2, 1, 1, 1) + 0.0,
        cells[:2] - torch.tensor([11.5, 9.5]).view(2, 1, 1, 1),
    )


def test_shares_of_classes_are_those_of_the_voxels_that_are_there():
    labels = structures(0)
    shares = class_shares(labels, 4, 3)
    torch.testing.assert_close(shares.sum(0), torch.ones(shares.shape[1:]))
    x, y, z = 8, 3, 6  # the last of two axes: 2 and 3 voxels
    part = labels[4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 4 * z : 4 * z + 4]
    assert part.shape == (2, 4, 3)
    torch.testing.assert_close(shares[:, x, y, z], torch.bincount(part.flatten(), minlength=3) / part.numel())


TINY = {
    "primus": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": (4, 4, 4)},
    "resenc": {"hidden_sizes": [4, 6, 8, 8], "strides": [1, 2, 2, 2], "depths": [1, 1, 1, 1]},
}


def tiny(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_encoder(name, (16, 16, 16), {}, **TINY[name]).eval()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("stride", [4, 8])
def test_dense_cells_of_any_size_lie_where_their_voxels_are(name, stride):
    encoder, volume = tiny(name), torch.zeros(1, 33, 18, 24)
    changed = volume.clone()
    changed[..., 24 : 24 + stride, 8 : 8 + stride, 16 : 16 + stride] = 5.0
    before, after = (dense_cells(encoder, v, stride) for v in (volume, changed))
    assert before.shape[1:] == tuple(-(-n // stride) for n in (33, 18, 24))
    far = (after - before).abs().sum(0)
    assert np.unravel_index(int(far.argmax()), far.shape) == (24 // stride, 8 // stride, 16 // stride)


def test_larger_budgets_have_the_volumes_of_smaller_ones():
    pool, test, seen = [planted(seed, 0.2) for seed in range(4)], [planted(20, 0.2)], []

    def probe(train, test, classes):
        seen.append([id(case) for case in train])
        return [case.labels for case in test]

    found = dense_probe.probe_by_budget(probe, pool, test, 3, (1, 3), draws=2)
    assert {budget: values.shape for budget, values in found.items()} == {1: (2, 1, 2), 3: (2, 1, 2)}
    assert (found[3] == 1).all()
    assert [numbers[0] for numbers in seen[2:]] == [numbers[0] for numbers in seen[:2]]
    with pytest.raises(ValueError, match="5 labelled volumes"):
        dense_probe.probe_by_budget(probe, pool, test, 3, (5,), draws=1)


def test_the_effective_rank_of_known_spectra():
    rows = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0))).Q
    assert rank_me(rows) == pytest.approx(8, rel=1e-4)
    assert rank_me(rows[:, :1].expand(-1, 8)) == pytest.approx(1, abs=1e-3)
    spectrum = torch.tensor([4.0, 2.0, 1.0, 1.0, 0, 0, 0, 0])
    expected = np.exp(-sum(p * np.log(p) for p in (0.5, 0.25, 0.125, 0.125)))
    assert rank_me(rows * spectrum) == pytest.approx(expected, rel=1e-3)
    assert rank_me((rows * spectrum).T[:, :20]) <= 8
    with pytest.raises(ValueError, match="collapsed"):
        rank_me(torch.zeros(5, 3))


def test_places_are_read_where_they_are():
    """A coordinate field at stride 4, read between cell centres, is the place itself."""
    field = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in (24, 20, 16)], indexing="ij"))[None]
    points = torch.tensor([[[[2.0, 3.0, 4.0], [4.0, 5.0, 8.0]], [[20.5, 11.25, 9.0]] * 2]])
    found = read_cells(torch.nn.functional.avg_pool3d(field, 4), points, (24, 20, 16))
    torch.testing.assert_close(found, points.mean(2))


def test_retrieval_counts_places_that_find_themselves():
    cells = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(2, 6, dtype=torch.bool)
    assert retrieval(cells, 3 * cells, inside) == 1.0
    swapped = cells[:, [1, 0, 2, 3, 4, 5]]
    assert retrieval(cells, swapped, inside) == pytest.approx(4 / 6)
    inside[:, :2] = False
    assert retrieval(cells, swapped, inside) == 1.0


def test_labels_are_carried_to_a_shifted_copy():
    """Features are a random function of the place in the body: the shift is found, unless it is out of reach."""
    body = torch.randn(16, 9, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = ball((36, 24, 24), (16.0, 11.0, 11.0), 7)
    source = Case(body, labels, 4)
    target = Case(body.roll(1, 1), labels.roll(4, 0), 4)
    expected = float(dice(transport(source, source), labels, 2))
    assert expected > 0.8
    assert float(dice(transport(source, target), target.labels, 2)) == pytest.approx(expected)
    shift = np.column_stack((np.eye(3), (-4.0, 0.0, 0.0)))
    assert float(dice(transport(source, target, shift, 1.0), target.labels, 2)) == pytest.approx(expected)
    assert float(dice(transport(source, target, reach=1.0), target.labels, 2)) < 0.8


def test_whole_volumes_are_predicted_by_what_has_not_seen_them(monkeypatch):
    monkeypatch.setattr(scores, "DRAWS_OF_METRICS", 20)
    generator = torch.Generator().manual_seed(0)
    features, classes = torch.randn(60, 10, generator=generator), torch.arange(60) % 3
    assert (pooled_probe(features, classes).argmax(1) == classes.numpy()).mean() < 0.6
    features[:, 0] += 4.0 * classes
    probabilities = pooled_probe(features, classes)
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert (probabilities.argmax(1) == classes.numpy()).mean() > 0.9
    assert scores.regression_scores(pooled_regression(features, classes.numpy()), classes.numpy())["r2"].value > 0.7
    nearest = pooled_neighbours(features[:, :1], torch.nn.functional.one_hot(classes))
    assert nearest.sum(1) == pytest.approx(1, abs=1e-5)
    assert (nearest.argmax(1) == classes.numpy())[classes != 1].mean() > 0.9  # a cosine tells two ends of one number
    found = pooled_scores(features, classes.double().numpy())
    assert list(found) == ["linear mae", "linear r2", "knn mae", "knn r2"]
    assert found["linear r2"].value > 0.7
    with pytest.raises(ValueError, match="class 0 has 1 volumes"):
        pooled_probe(features[:2], torch.tensor([0, 1]))


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Six volumes with a bright and a brighter ball, their labels, and an encoder."""
    folder = tmp_path_factory.mktemp("judged")
    for seed in range(6):
        labels, noise = structures(seed, (34, 28, 26)).numpy(), np.random.default_rng(seed).normal(0, 5, (34, 28, 26))
        save_nifti(folder / "images" / f"case_{seed}.nii.gz", (50 + 60 * labels + noise).astype(np.float32))
        save_nifti(folder / "labels" / f"case_{seed}.nii.gz", (85 * labels).astype(np.uint8))
    tiny("resenc").save_pretrained(folder / "encoder")
    return folder


def judge(*arguments) -> None:
    evaluate_encoder.main(evaluate_encoder.parse_arguments([str(a) for a in arguments]))


def test_one_command_judges_an_encoder(judged, capsys, tmp_path):
    data = "--data", judged / "images", "--labels", judged / "labels"
    written = "--output", tmp_path / "found.json", "--picture", tmp_path / "found.png"
    numbers = "--stride", 4, "--samples", 4, "--budgets", 1, 2, "--draws", 1
    judge(judged / "encoder", *data, *numbers, *written)
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert list(rows) == ["encoder", "untrained", "intensity", "place"]
    assert "| encoder |" in capsys.readouterr().out
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert rows["intensity"]["linear@2"] > 0.7 > rows["place"]["linear@1"]
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())


def test_one_command_probes_what_is_known_of_subjects(judged, capsys, tmp_path, monkeypatch):
    """How bright they are, which means of intensity tell."""
    monkeypatch.setattr(scores, "DRAWS_OF_METRICS", 20)
    rows = [f"case_{seed}.nii.gz,{seed % 2},{'ab'[seed % 2]}" for seed in range(6)]
    for seed in range(6):
        image = nib.load(judged / "images" / f"case_{seed}.nii.gz").get_fdata()
        brighter = image + 300 * (seed % 2) * (image > 80)
        save_nifti(tmp_path / "in" / f"case_{seed}.nii.gz", brighter.astype(np.float32))
    (tmp_path / "table.csv").write_text("\n".join(["path,size,kind", *rows]) + "\n")
    asked = "--data", tmp_path / "in", "--targets", tmp_path / "table.csv", "--stride", 4, "--samples", 1
    judge(judged / "encoder", *asked, "--target", "size", "--output", tmp_path / "found.json")
    pooled = json.loads((tmp_path / "found.json").read_text())["pooled"]
    assert list(pooled) == ["encoder", "untrained", "intensity"]
    value, low, high = pooled["intensity"]["knn r2"]
    assert low <= value <= high
    assert value > 0.5
    judge(judged, *asked, "--target", "kind", "--classify")  # a run has an encoder
    assert "linear balanced_accuracy" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no column colour among its columns path, size, kind"):
        judge(judged / "encoder", *asked, "--target", "colour")
    with pytest.raises(ValueError, match="name both"):
        judge(judged / "encoder", *asked)


def test_what_cannot_be_judged_is_one_line_with_the_remedy(judged, tmp_path):
    data, encoder, tuned = ("--data", judged / "images"), judged / "encoder", tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "config.json").write_text('{"model_type": "resenc_segmentation"}')
    (tuned / "model.safetensors").write_bytes(b"")
    (tmp_path / "none").mkdir()
    tiny("resenc").resize_input_channels(2).save_pretrained(tmp_path / "two")
    for seed in range(6):
        save_nifti(tmp_path / "empty" / f"case_{seed}.nii.gz", np.zeros((34, 28, 26), np.uint8))
    bad = {
        "labelled volumes are not there": (encoder, "--labels", judged / "labels", "--budgets", 9, "--samples", 1),
        "runs/NAME/encoder": (tuned,),
        "2 channels": (tmp_path / "two",),
        "no file has the name of a volume": (encoder, "--labels", tmp_path / "none"),
        "nothing but background in all label maps": (encoder, "--labels", tmp_path / "empty"),
    }
    for words, arguments in bad.items():
        with pytest.raises(ValueError, match=words) as caught:
            judge(*arguments, *data)
        assert is_for_the_user(caught.value)
