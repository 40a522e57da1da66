"""The experiment on what pretraining is worth: splits, equal compute, the published misalignment, verdicts."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import draw_heads, evidence, evidence_arms
from benchmarks.evidence_arms import ARMS, Arm, compute, flops_of_a_step, length, misaligned_points, pretrain
from benchmarks.evidence_probe import Labelled, cells_of, draw, kept, of_what_is_there, split, with_place
from benchmarks.evidence_report import Row, by_subject, comparison_table, interval, score_table
from benchmarks.script_runs import open_recipe
from data.views import alignment_points, sample_views, to_volume


def offsets(crop: int, volume: int, cells: int, stride: int, points_of) -> torch.Tensor:
    """How far apart in the volume two views are compared, in voxels: `[views, cells, 3]`."""
    found = []
    for seed in range(100):
        rng, still = np.random.default_rng(seed), np.eye(3)
        views = sample_views(rng, (volume,) * 3, (crop,) * 3, (0.4, 0.8), 0.0, still, (still, still))
        affines = torch.from_numpy(views)
        (first, second), inside = points_of(affines, (crop,) * 3, (cells,) * 3, (2, 2, 2), (stride,) * 3)
        assert inside.all()
        found.append((to_volume(affines[0], first) - to_volume(affines[1], second)).mean(1))
    return torch.stack(found)


@pytest.mark.parametrize(("crop", "volume", "voxels"), [(160, 257, 29.7), (128, 205, 23.1)])
def test_the_misalignment_is_as_large_as_measured_in_the_published_code(crop, volume, voxels):
    found = offsets(crop, volume, 7, 8, misaligned_points)
    assert found.norm(dim=-1).mean() == pytest.approx(voxels, rel=0.1)
    first, middle, last = found.abs().mean((0, 1))
    assert middle == pytest.approx(2.3, rel=0.15)  # only rounding and the border convention
    assert first > 5 * middle
    assert last > 5 * middle


def test_the_misalignment_scales_with_the_crop_and_ours_is_none():
    assert offsets(24, 40, 4, 4, alignment_points).abs().max() < 1e-6
    assert 0.15 * 24 < offsets(24, 40, 4, 4, misaligned_points).norm(dim=-1).mean() < 0.25 * 24


def test_the_misaligned_points_of_views_are_always_the_same_and_inside():
    views = sample_views(np.random.default_rng(0), (40,) * 3, (24,) * 3, (0.4, 0.8), 0.0, np.eye(3), (np.eye(3),) * 2)
    how = torch.from_numpy(views), (24,) * 3, (4,) * 3, (2,) * 3, (4,) * 3
    once, again = misaligned_points(*how), misaligned_points(*how)
    assert torch.equal(once[0], again[0])
    assert once[1].all()
    assert once[0].min() >= 1.5
    assert once[0].max() <= 21.5


def test_test_cases_are_not_in_the_pool_and_budgets_are_nested():
    names = [f"volume_{number}" for number in range(20)]
    parts = split(names, 6, seed=1)
    assert sorted([*parts.pool, *parts.test]) == list(range(20))
    assert len(parts.test) == 6
    assert not np.array_equal(parts.test, split(names, 6, seed=2).test)
    few, more = draw(parts.pool, 2, 0), draw(parts.pool, 5, 0)
    assert np.array_equal(few, more[:2])
    assert set(more) <= set(parts.pool)
    assert not np.array_equal(more, draw(parts.pool, 5, 1))


def test_a_subject_is_tested_on_with_all_of_its_volumes():
    subjects = [f"subject_{number % 5}" for number in range(20)]  # 4 volumes each
    parts = split(subjects, 6, seed=0)
    tested, trained = ({subjects[number] for number in numbers} for numbers in (parts.test, parts.pool))
    assert sorted([*parts.pool, *parts.test]) == list(range(20))
    assert (len(tested), len(parts.test)) == (2, 8)
    assert not tested & trained


def test_a_structure_that_a_volume_hardly_has_is_not_scored():
    labels = torch.zeros(20, 20, 20, dtype=torch.long)
    labels[:4, :4, :4], labels[10, 10, :5] = 1, 2
    first, second, third = of_what_is_there(torch.tensor([0.5, 0.5, 0.0]), labels)
    assert first == 0.5
    assert np.isnan(second)
    assert np.isnan(third)


def test_a_probe_that_is_told_the_place_knows_it_besides_the_features():
    volume = Labelled("a", "a", torch.rand(1, 8, 12, 10), torch.zeros(8, 12, 10, dtype=torch.long), (1.0, 1.0, 1.0))
    (alone,) = cells_of("raw intensity", [volume])
    (placed,) = with_place([alone], [volume])
    (place,) = cells_of("place alone", [volume])
    assert torch.equal(placed.cells, torch.cat((alone.cells, place.cells)))
    assert placed.labels is alone.labels


def test_heads_are_drawn_with_a_structure_where_its_label_is(tmp_path):
    maps, size = tmp_path / "maps", 90
    (maps / "priors").mkdir(parents=True)
    heads = np.zeros((size,) * 3, np.int16)
    heads[20:70, 20:70, 20:70], heads[35:55, 35:55, 35:55] = 3, 2  # cortex around white matter
    nib.save(nib.Nifti1Image(heads, np.eye(4)), maps / "head.nii.gz")
    numbers = {"generation_labels": [0, 3, 2], "generation_classes": [0, 1, 2]}
    numbers |= {"generation_classes_contrast_specific": [0, 2, 1]}
    numbers |= {"prior_means_t1": [[5, 200, 50], [1, 1, 1]], "prior_stds_t1": [[3, 3, 3], [1, 1, 1]]}
    for name, values in numbers.items():
        np.save(maps / "priors" / f"{name}.npy", np.array(values, float))
    asked = ["--maps", str(maps), "--output", str(tmp_path / "heads"), "--boxes", "2"]
    draw_heads.main(draw_heads.parse_arguments(asked))
    with pytest.raises(ValueError, match="it must hold label maps"):
        draw_heads.main(draw_heads.parse_arguments(["--maps", str(tmp_path), *asked[2:]]))
    for path in sorted((tmp_path / "heads" / "labelled" / "images").iterdir()):
        image, labels = (
            nib.load(tmp_path / "heads" / "labelled" / part / path.name).get_fdata() for part in ("images", "labels")
        )
        assert image.shape == labels.shape == (56, 56, 56)
        assert set(np.unique(labels)) <= {0, 1, 2}
        assert np.median(image[labels == 1]) > 2 * np.median(image[labels == 2])  # white matter in T1
        assert not image[labels == 0].any()
    names = sorted(path.name for path in (tmp_path / "heads" / "unlabelled").iterdir())
    assert names == ["sub-01_run-01_MR.nii.gz", "sub-01_run-02_MR.nii.gz"]


@pytest.mark.parametrize("network", ["primus", "resenc"])
def test_every_arm_has_a_recipe(network):
    for arm in ARMS.values():
        if network in arm.networks:
            _, recipe = open_recipe(arm.recipe(network), [*arm.overrides, *length(10, 1), "data.leave_out=[a.nii.gz]"])
            assert recipe.train.steps == 10
            assert recipe.train.warmup_steps == 1


def test_arms_take_the_same_compute():
    whole = compute("primus", [])
    for name in ("MAE", "Spatial-Aware"):
        arm = ARMS[name]
        a_step = flops_of_a_step(arm.recipe("primus"), arm.overrides)
        _, recipe = open_recipe(arm.recipe("primus"), [*arm.overrides, *length(whole, a_step)])
        assert recipe.train.steps * a_step == pytest.approx(whole, abs=a_step / 2)
        assert recipe.train.steps > open_recipe(Arm().recipe("primus"), [])[1].train.steps


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    calls = []

    def stub(function, name, network, overrides, data, output):
        calls.append(output.exists())
        output.mkdir()
        return {"steps": 3}

    monkeypatch.setattr(evidence_arms, "apart", stub)
    output = tmp_path / "one"
    output.mkdir()
    (output / "metrics.jsonl").touch()  # of a run that was killed
    for _ in range(2):
        assert pretrain("MAE", "primus", [], tmp_path, output) == {"steps": 3}
    assert calls == [False]

    made = iter([{"dice": 0.5}])
    for _ in range(2):
        assert kept(tmp_path / "new" / "tuning.json", lambda: next(made)) == {"dice": 0.5}


@pytest.mark.parametrize(("how", "best"), [("probe", 3e-3), ("finetune", 1e-3)])
def test_the_rate_is_that_of_the_encoder_that_does_best_on_training_subjects(how, best, tmp_path, monkeypatch):
    command = ["--data", "data", "--output", str(tmp_path), "--tune-by", how, "--rates", "1e-3", "3e-3", "9e-3"]
    experiment = object.__new__(evidence.Experiment)
    experiment.asked, experiment.output = evidence.parse_arguments([*command, "--finetune-rates", "1", "2"]), tmp_path
    experiment.volumes = [Labelled(str(n), str(n), torch.zeros(1), torch.zeros(1), (1, 1, 1)) for n in range(100)]
    experiment.unlabelled = experiment.labelled = tmp_path
    experiment.splits, experiment.classes = [split([one.name for one in experiment.volumes], 20, 0)], 3
    experiment.pretrained_on = set()
    probed = {"split0_rate0.001": 0.3, "split0_rate0.003": 0.4, "split0_rate0.009": 0.2}
    tuned = {"split0_rate0.001": [0.2, 0.6], "split0_rate0.003": [0.5, 0.5], "split0_rate0.009": [0.4, 0.1]}

    def fine_tune(encoder, prepared, output, scored, others, classes, budget, number, rate, overrides):
        assert not {int(one.name) for one in scored} & {*experiment.splits[0].test}
        assert {int(one.name) for one in others} == {*experiment.splits[0].test}
        return {"dice": [[tuned[encoder.parent.name][int(rate) - 1]]]}

    monkeypatch.setattr(evidence, "flops_of_a_step", lambda *numbers: 1)
    monkeypatch.setattr(evidence, "compute", lambda *numbers: 100)
    monkeypatch.setattr(evidence, "subjects_of", lambda folder: {})
    monkeypatch.setattr(evidence, "pretrain", lambda *numbers: None)
    monkeypatch.setattr(evidence, "tuning_score", lambda encoder, *numbers: probed[encoder.parent.name])
    monkeypatch.setattr(evidence, "fine_tune", fine_tune)
    assert experiment.rate(evidence.One("primus", "MAE", 0, 2)) == best
    assert experiment.rate(evidence.One("primus", "untrained", 0, 2)) is None


def row(arm: str, dice: np.ndarray, network: str = "primus") -> Row:
    return Row(network, arm, "probe", {"dice": {5: dice}, "nsd": {5: dice}})


def test_a_difference_is_called_one_only_where_seeds_and_cases_agree():
    rng = np.random.default_rng(0)
    cases = rng.uniform(0.3, 0.7, (1, 1, 40, 2))
    base = cases + rng.normal(0, 0.02, (3, 4, 40, 2))
    by_seed = np.array([0.06, -0.05, 0.02])[:, None, None, None]
    rows = [row("untrained", base - 0.1), row("MAE", base), row("MAE + CVA", base + by_seed)]
    _, _, trained, aligned_too, aligned = comparison_table(rows).splitlines()
    assert "| MAE + CVA | untrained |" in aligned_too
    assert "| better |" in trained
    assert "+0.100 [" in trained
    assert "| no difference shown |" in aligned
    assert "+0.060, -0.050, +0.020" in aligned
    few = comparison_table([row("untrained", base[:2] - 0.1), row("MAE", base[:2])])
    assert "| not judged, 2 seeds |" in few
    assert "better" not in few


def test_volumes_of_a_subject_are_one_case():
    scores = [[[0.2, np.nan], [0.4, np.nan], [0.9, 0.5]]]  # one draw, three volumes, two structures
    found = by_subject(scores, ["b", "b", "a"])
    np.testing.assert_allclose(found, [[[0.9, 0.5], [0.3, np.nan]]])


def test_the_interval_holds_the_mean_and_grows_with_the_spread_of_seeds():
    rng = np.random.default_rng(0)
    values = 0.5 + rng.normal(0, 0.05, (3, 4, 40))
    mean, low, high = interval(values)
    assert low < mean < high
    assert mean == pytest.approx(values.mean())
    _, wide_low, wide_high = interval(values + np.array([-0.1, 0, 0.1])[:, None, None])
    assert wide_high - wide_low > 3 * (high - low)


def test_a_table_has_a_row_for_each_arm_and_leaves_out_what_is_not_there():
    rows = [
        row("MAE", np.full((2, 1, 3, 2), 0.25)),
        Row("primus", "SAL", "probe", {"dice": {1: np.ones((1, 1, 3, 2))}}),
    ]
    _, _, first, second = score_table(rows, "dice", structure=1).splitlines()
    assert first == "| primus | MAE | 2 |  | 0.250 [0.250, 0.250] |"
    assert second == "| primus | SAL | 1 | 1.000 [1.000, 1.000] |  |"


@pytest.mark.slow
def test_a_tiny_experiment_from_volumes_to_table(tmp_path):
    rng, where = np.random.default_rng(0), np.indices((28, 30, 26)).sum(0)
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for number in range(26):
        labels = (where > 30 + number).astype(np.uint8) + (where > 50)
        image = labels + rng.normal(0, 0.2, labels.shape)
        for part, voxels in (("images", image.astype(np.float32)), ("labels", labels.astype(np.uint8))):
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "data" / part / f"case_{number:02}.nii.gz")
    command = [sys.executable, ROOT / "benchmarks" / "evidence.py", "train.steps=2", "train.warmup_steps=0"]
    command += ["train.batch_size=2", "--data", tmp_path / "data", "--output", tmp_path / "out", "--networks", "primus"]
    command += ["--arms", "untrained", "MAE + CVA misaligned", "--seeds", "1", "--test", "4", "--rates", "1e-3"]
    command += ["--finetune-arms", "untrained", "--finetune-budgets", "2", "--finetune-draws", "1"]
    command += ["--budgets", "1", "2", "--draws", "2", "--nsd-budgets", "2", "--place-budgets", "2"]
    command += ["--finetune-rates", "1e-3", "--finetune-numbers", "train.steps=2", "train.warmup_steps=0"]
    command += ["run.checkpoint_every=2"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {one["arm"] for one in results["results"]} == {
        *("untrained", "MAE + CVA misaligned", "raw intensity", "place alone")
    }
    for one in results["results"]:
        draws = {"probe": 2, "placed": 2, "finetune": 1}[one["how"]]
        assert np.shape(one["scores"]["dice"]["2"]) == (1, draws, 4, 2)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10_000
    assert "MAE + CVA misaligned" in (tmp_path / "out" / "table.md").read_text()

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("p*.json")}
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0
    assert "predicted   0.0 h" in again.stdout
    assert times
    assert times == {path: path.stat().st_mtime_ns for path in times}
