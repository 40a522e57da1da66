"""train_alice.py: its schedule and recipes, its picture, and whole runs."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, config, launch, save_nifti, whole_state
from test_alice import TINY_ALICE, pairs, same, tiny_alice

import train_alice
from pictures.patients import draw_patients, pair_of
from training.metrics import read_metrics
from training.recipe import load_recipe
from training.schedules import learning_rate

# --------------------------------------------------------------------------- schedules and recipes


def test_the_teacher_is_sharp_at_first():
    found = [train_alice.teacher_temperature(step, 1000, 0.04, 0.07, 0.03) for step in (0, 15, 30, 1000)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert train_alice.teacher_temperature(0, 10, 0.04, 0.07, 0.0) == 0.07


SHIPPED = sorted((ROOT / "recipes").glob("*_alice.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_learning_rate_never_rises_after_the_warm_up(path):
    recipe = load_recipe(path, [], train_alice.AliceRecipe)
    assert recipe.name == path.stem
    train, peak = recipe.train, recipe.optimizer.learning_rate
    rates = [
        learning_rate(step, train.steps, peak, train.warmup_steps, train.decay_power) for step in range(train.steps)
    ]
    assert max(rates) <= peak * (1 + 1e-12)  # of the last step of a warm-up, rounded
    after = np.array(rates[train.warmup_steps :])
    assert (np.diff(after) <= 0).all()


def test_recipes_say_what_is_wrong():
    load = lambda *numbers: load_recipe(train_alice.DEMO, list(numbers), train_alice.AliceRecipe)  # noqa: E731
    with pytest.raises(ValueError, match="all weights are 0"):
        load("loss.reconstruction_weight=0", "loss.volume_weight=0", "loss.patch_weight=0")
    with pytest.raises(ValueError, match=r"alignment.* does not divide over heads=7: set size="):
        load("alignment.heads=7")


def test_a_stream_has_no_pairs():
    arguments = train_alice.parse_arguments("", ["--data", "org/name", "--stream"])
    with pytest.raises(ValueError, match=r"prepare_data\.py"):
        train_alice.main(arguments)


def test_the_picture_shows_a_pair(tmp_path):
    model, data = tiny_alice().eval(), pairs()
    data["crop_to_frame"] = torch.cat((torch.eye(3), torch.zeros(3, 1)), dim=1).repeat(4, 1, 1)
    data["crop_to_frame"][2, 0, 3] = 5.0
    with torch.no_grad():
        pair = pair_of(data, model(**data, return_outputs=True))
    assert torch.equal(pair["views"], data["views"][[0, 2]])
    planes = (("sagittal", 0), ("coronal", 1), ("axial", 2))
    draw_patients(tmp_path, planes, pair)
    draw_patients(tmp_path / "few", planes, {key: pair[key] for key in ("views", "present", "crop_to_frame")})
    assert (tmp_path / "patients.png").stat().st_size > (tmp_path / "few" / "patients.png").stat().st_size > 10_000


# --------------------------------------------------------------------------- runs


def run(output, data, *more, strategy="ddp", ranks=1, numbers=TINY_ALICE, check=True):
    """A run of train_alice.py, by several_runs.py where it has several ranks: only it has FSDP2 on a CPU."""
    arguments = ["--config", config(strategy), "--data", data, "--output", output, *more, *numbers]
    if ranks == 1:
        return launch(*arguments, script=ROOT / "train_alice.py", check=check)
    planned = [{"script": "train_alice", "arguments": [str(argument) for argument in arguments], "draws": True}]
    runs = output.with_suffix(".json")
    runs.write_text(json.dumps(planned))
    done = launch(runs, script=ROOT / "tests" / "several_runs.py", ranks=ranks)
    assert "run 0 exit 0" in done.stdout, done.stdout + done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), ("zero3", 2)])
def test_a_run_goes_on_bit_for_bit_and_shows_its_pairs(strategy, ranks, volumes, tmp_path):
    run(tmp_path / "run", volumes, strategy=strategy, ranks=ranks)
    checkpoints = tmp_path / "run" / "checkpoints"
    expected = whole_state(checkpoints / "step_4")
    halfway = whole_state(checkpoints / "step_2")
    centres = [f"model.centres.{term}.mean" for term in ("volume", "patch")]
    for name in centres:
        assert float(halfway[name].abs().max()) > 0
        assert not torch.equal(expected[name], halfway[name])
    shutil.rmtree(checkpoints / "step_4")
    run(tmp_path / "run", volumes, "--resume", "auto", strategy=strategy, ranks=ranks)
    assert same(whole_state(checkpoints / "step_4"), expected)
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    report = {path.name for path in (tmp_path / "run" / "report").iterdir()}
    assert {"losses.png", "patients.png", "reconstruction.png"} <= report
    scores = json.loads((tmp_path / "run" / "held_out.jsonl").read_text().splitlines()[-1])
    assert scores["patient_retrieval_by_chance"] == pytest.approx(1 / (4 / ranks))
    assert scores["attention_error_by_chance"] > 0
    assert {"reconstruction_by_interpolation", "feature_variance", "volume_prototype_use"} <= scores.keys()


@pytest.mark.slow
def test_one_volume_is_a_pair_of_its_own_and_that_is_said(tmp_path):
    save_nifti(tmp_path / "data" / "a.nii", blobs(0))
    done = run(tmp_path / "run", tmp_path / "data")
    assert "each pair is the volume with itself" in done.stderr
