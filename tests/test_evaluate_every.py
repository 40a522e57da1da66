"""Encoders are judged while their run goes on: by which volumes, and what comes of it. tests/test_train.py runs it."""

import json
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, blobs, prepared, save_nifti

import finetune
import train_cva
from data.labels import labelled_rows
from data.store import PreparedVolumes
from evaluation import in_run
from models import build_encoder
from training import evaluation
from training.command_line import is_for_the_user
from training.evaluation import Evaluation, Judged, check_evaluation, choose_volumes
from training.recipe import load_recipe
from training.run_data import RunData
from training.run_folder import RunFolder

DEMO = ROOT / "recipes" / "demo.yaml"
CLASSES = ["data.classes={background: 0, tissue: 1}"]


def recipe_of(*overrides):
    return load_recipe(DEMO, [*TINY, *overrides], train_cva.CVARecipe)


def save_labelled(folder, cases=6, shape=(32, 30, 28)):
    for seed in range(cases):
        volume = blobs(seed, shape)
        save_nifti(folder / "images" / f"case_{seed}.nii.gz", volume)
        labels = np.digitize(volume, np.quantile(volume, (0.5, 0.85))).astype(np.uint8)
        save_nifti(folder / "labels" / f"case_{seed}.nii.gz", labels)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return save_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(evaluation.joblib, "cpu_count", lambda: 1)  # others would import all first


@pytest.fixture(scope="module")
def trained_on(labelled, tmp_path_factory):
    volumes = prepared(labelled / "images", tmp_path_factory.mktemp("prepared"))
    return PreparedVolumes(volumes.manifest, np.arange(len(volumes)))


def chosen(volumes, folder, evaluate_on=None, validation=None):
    said = []
    data = RunData(volumes, validation, None, None, volumes.spacing, None, {})
    judged = choose_volumes(recipe_of("run.evaluate_every=2"), evaluate_on, RunFolder(folder), data, said.append)
    return judged, said


# --------------------------------------------------------------------------- before the run


@pytest.mark.parametrize(
    ("every", "on", "streams", "words"),
    [
        (0, "labelled", False, "a multiple of run.checkpoint_every=2"),
        (2, None, True, "--evaluate-on FOLDER"),
        (2, "nowhere", False, "images/ and labels/"),
    ],
)
def test_what_cannot_be_is_said_at_once(every, on, streams, words, labelled, tmp_path):
    folder = {"labelled": labelled, "nowhere": tmp_path}.get(on)
    with pytest.raises(ValueError, match=words) as caught:
        check_evaluation(recipe_of(f"run.evaluate_every={every}"), folder, streams)
    assert is_for_the_user(caught.value)


def test_fine_tuning_is_scored_as_it_is():
    recipe = load_recipe(ROOT / "recipes" / "demo_segmentation.yaml", CLASSES, finetune.SegmentationRecipe)
    running = recipe.run.model_copy(update={"evaluate_every": 2})
    with pytest.raises(ValueError, match="of pretraining"):
        check_evaluation(recipe.model_copy(update={"run": running}), None, streams=False)


def test_encoders_are_written_with_checkpoints():
    with pytest.raises(ValueError, match=r"multiple of checkpoint_every=2.*set run.evaluate_every=4"):
        recipe_of("run.evaluate_every=5")
    assert recipe_of("run.evaluate_every=4").run.evaluate_every == 4


def test_volumes_kept_for_validation_come_first(trained_on, tmp_path):
    kept = PreparedVolumes(trained_on.manifest, np.array([4, 1]))
    judged, (line,) = chosen(trained_on, tmp_path, validation=kept)
    assert (judged.rows, judged.labelled) == ([4, 1], False)
    assert "every 2 steps" in line
    assert "2 volumes kept for validation" in line
    judged, (line,) = chosen(trained_on, tmp_path)
    assert judged.rows == [0, 1, 2, 3, 4, 5]
    assert "6 volumes trained on" in line


def test_no_more_volumes_than_needed_and_those_trained_on_are_told(trained_on, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "VOLUMES", 3)
    monkeypatch.setattr(evaluation, "LABELLED", 4)
    assert chosen(trained_on, tmp_path)[0].rows == [0, 2, 5]
    judged, (line, seen) = chosen(trained_on, tmp_path, labelled)
    assert judged.labelled
    kept = [path for path in (judged.folder / "labels").rglob("*") if path.is_file()]  # in folders of two letters
    assert len(judged.rows) == len(kept) == 4
    assert f"4 volumes of {labelled.name}" in line
    assert seen.startswith("            4 of them are trained on, too")
    again, _ = chosen(trained_on, tmp_path, labelled)
    assert again == judged
    streamed = RunData([None], None, None, object(), (1.0, 1.0, 1.0), None, {})
    said = []
    assert judged == choose_volumes(
        recipe_of("run.evaluate_every=2"), labelled, RunFolder(tmp_path), streamed, said.append
    )
    assert len(said) == 1  # what is trained on is not known
    ready, _ = chosen(trained_on, tmp_path, judged.folder)
    assert ready.rows == judged.rows
    assert ready.words.split("(")[1] == judged.words.split("(")[1]  # the same volumes, whatever they are called


def test_labels_that_are_no_use_are_one_line(trained_on, tmp_path):
    few, empty, other = (save_labelled(tmp_path / name, 3) for name in ("few", "empty", "other"))
    (few / "labels" / "case_0.nii.gz").unlink()
    for seed in range(3):
        save_nifti(empty / "labels" / f"case_{seed}.nii.gz", np.zeros((32, 30, 28), np.uint8))
    save_nifti(other / "labels" / "case_1.nii.gz", np.ones((32, 30, 27), np.uint8))
    for folder, words in ((few, "give 3 or more"), (empty, "empty"), (other, r"case_1.*\(32, 30, 27\)")):
        with pytest.raises(ValueError, match=f"^--evaluate-on {folder}: .*{words}") as caught:
            chosen(trained_on, tmp_path / folder.name / "run", folder)
        assert is_for_the_user(caught.value)


# --------------------------------------------------------------------------- the process that judges


def encoder_in(folder, channels=1):
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [4, 8], "strides": [1, 2], "depths": [1, 1], "num_channels": channels}
    build_encoder("resenc", (16, 16, 16), {"orientation": "RAS"}, **sizes).save_pretrained(folder)
    return folder


def task_of(tmp_path, judged, encoder, **more):
    task = {"encoder": str(encoder), "folder": str(judged.folder), "rows": judged.rows, "labelled": judged.labelled}
    return task | {"known": [], **more}


def test_an_encoder_is_judged_beside_what_has_learned_nothing(trained_on, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(in_run, "SAMPLES", 2)
    judged, _ = chosen(trained_on, tmp_path / "run", labelled)
    task = task_of(tmp_path, judged, encoder_in(tmp_path / "encoder"))
    rows = in_run.judge(task)
    assert list(rows) == ["encoder", "untrained", "intensity", "place"]
    assert rows["encoder"].keys() >= {"retrieval", "rank", "pooled_rank", "linear@1", "knn@1", "transport"}
    assert "linear@5" not in rows["encoder"]  # 6 volumes, of which 2 are tested on
    assert rows["intensity"]["linear@1"] > 0.5 > rows["place"]["linear@1"]  # the classes are thresholds

    told = {"step": 2, "evaluation": {"on": "x", "rows": rows | {"untrained": {"retrieval": -1.0}}}}
    again = in_run.judge(task | {"known": [told]})
    assert again["encoder"] == rows["encoder"]
    assert again["untrained"] == {"retrieval": -1.0}  # not judged a second time
    in_run.report([told, {"step": 4, "evaluation": {"on": "x", "rows": rows}}], tmp_path / "report")
    text = (tmp_path / "report" / "evaluation.md").read_text()
    assert all(words in text for words in ("Step 4, on x", "| untrained |", "| step 2 |", "| step 4 |"))
    assert (tmp_path / "report" / "evaluation.png").stat().st_size > 1000


def test_the_middle_of_a_large_volume_is_looked_at_and_all_channels(labelled, tmp_path):
    volumes = prepared(labelled / "images", tmp_path / "labelled", labels=labelled / "labels")
    number = int(labelled_rows(volumes.manifest)[0])
    held = in_run.hold(volumes, number, (16, 99, 7), coarsest_last=False)
    x, y, z = (min(a, b) for a, b in zip((16, 99, 7), volumes[number].shape))
    starts = [(have - size) // 2 for have, size in zip(volumes[number].shape, (x, y, z))]
    box = tuple(slice(start, start + size) for start, size in zip(starts, (x, y, z)))
    assert np.array_equal(held.voxels[0], volumes[number][box].astype(np.float32))
    assert np.array_equal(held.labels, volumes[number].labels[box])

    thick = prepared(labelled / "images", tmp_path / "thick", spacing=(3.0, 1.0, 1.0))
    held = in_run.hold(thick, 0, (9, 8, 3), coarsest_last=True)
    assert (held.shape, held.spacing) == ((9, 8, 3), (1.0, 1.0, 3.0))

    for seed in range(2):
        for name in ("T1w", "FLAIR"):
            anat = tmp_path / "two" / f"sub-{seed}" / "anat"
            save_nifti(anat / f"sub-{seed}_{name}.nii.gz", blobs(seed + 5 * (name == "FLAIR"), (20, 18, 17)))
    two = prepared(tmp_path / "two", tmp_path / "both", channels=("T1w", "FLAIR"))
    judged = Judged(two.manifest.folder, list(range(4)), False, "2 volumes")
    rows = in_run.judge(task_of(tmp_path, judged, encoder_in(tmp_path / "encoder", 2)))
    assert all(0 <= row["retrieval"] <= 1 for row in rows.values())


# --------------------------------------------------------------------------- beside the run


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """An `Evaluation` whose process is told what to answer, and what was said."""
    said, answers, asked = [], {}, []
    folder = RunFolder(tmp_path)
    encoder_in(folder.encoder)

    def ask(self, task):
        asked.append(task)
        assert in_run.load_encoder(self.place(task["step"]))  # its own copy
        answer = answers[task["step"]]
        answer = answer.result() if isinstance(answer, Future) else answer
        if isinstance(answer, Exception):
            raise answer
        return {"on": task["on"], "rows": {"encoder": {"rank": answer}, "untrained": {"rank": 1.0}}}

    monkeypatch.setattr(Evaluation, "_ask", ask)
    judged = Judged(tmp_path / "volumes", [0], False, "1 volume")

    def make():
        return Evaluation(judged, folder, lambda line, **_: said.append(line))

    return make, said, answers, asked, folder


def write(folder, records):
    with open(folder.metrics, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_results_come_with_their_step_and_know_those_before(beside):
    make, said, answers, asked, folder = beside
    one = make()
    answers |= {2: 3.0, 4: 5.0}
    one.start(2, last=False)
    one.start(4, last=True)  # waits for the one before
    one.wait(lambda: False)
    write(folder, records := one.results())
    assert [(r["step"], r["evaluation"]["rows"]["encoder"]["rank"]) for r in records] == [(2, 3.0), (4, 5.0)]
    assert "evaluation  step 4 (untrained): rank 5.000 (1.000)" in said
    assert [record["step"] for record in asked[1]["known"]] == [2]
    assert not list(folder.evaluation.iterdir())
    one.start(4, last=True)  # a finished run that is started again
    one.wait(lambda: False)
    assert not one.results()
    assert len(asked) == 2


def test_one_at_a_time_and_an_error_is_a_line(beside):
    make, said, answers, *_ = beside
    one, slow = make(), Future()
    answers |= {2: slow, 6: ValueError("all features are 0"), 8: 1.0}
    one.start(2, last=False)
    one.start(4, last=False)
    assert said[-1].startswith("evaluation  left out")
    assert "run.evaluate_every" in said[-1]
    slow.set_result(7.0)
    one.wait(lambda: False)
    one.start(6, last=False)
    one.wait(lambda: False)
    assert said[-1] == "evaluation  of step 6 failed: all features are 0"
    one.start(8, last=True)
    one.wait(lambda: False)
    assert [record["step"] for record in one.results()] == [2, 8]


def test_what_a_stop_or_a_kill_interrupts_is_judged_again(beside):
    make, said, answers, _, folder = beside
    killed = make()
    answers[4] = RuntimeError("killed")
    killed.start(4, last=False)
    killed.ended = True
    killed.end()
    assert not any("failed" in line for line in said)
    (folder.evaluation / "tmp-step_6").mkdir()
    resumed = make()
    resumed.take_up(2)  # its checkpoint is older: step 4 will be done again
    assert not list(folder.evaluation.iterdir())
    killed = make()
    killed.start(4, last=False)
    killed.ended = True
    killed.end()
    answers[4] = 2.0
    resumed.take_up(4)
    resumed.start(4, last=True)  # a run that was killed at its end
    resumed.wait(lambda: False)
    assert [record["step"] for record in resumed.results()] == [4]


def test_a_signal_ends_the_wait(beside):
    make, _, answers, *_ = beside
    one, slow = make(), Future()
    answers[4] = slow
    one.start(4, last=True)
    asked = iter((False, True))

    def stop():
        if found := next(asked):
            slow.set_result(RuntimeError("killed"))
        return found

    one.wait(stop)
    assert one.background.is_done
    assert one.place(4).is_dir()
