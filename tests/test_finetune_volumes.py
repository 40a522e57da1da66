"""finetune_volumes.py: what it refuses, and what a whole run leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, blobs, config, launch, prepared, save_nifti, whole_state
from test_finetune import NETWORKS, SHORT, run, write_tiny_encoder

import finetune
import finetune_volumes
import predict
import publish
from data.stream import stack_views
from finetuning.whole_volumes import Targets
from models import load_encoder, load_fine_tuned, segmentation_class
from training.metrics import read_metrics
from training.recipe import load_recipe


def write_sizes(folder: Path, cases: int = 8) -> Path:
    """Blobs that are brighter for higher numbers, and a table of what is known of them."""
    lines = ["path,size,kind"]
    for case in range(cases):
        volume = (blobs(case, (36, 40, 34)).astype(float) ** (1 + case / cases)).clip(max=3e4).astype(np.int16)
        save_nifti(folder / f"case_{case}.nii.gz", volume)
        lines.append(f"case_{case}.nii.gz,{20 + case / 2},{'yes' if case % 2 else 'no'}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> Path:
    return write_sizes(tmp_path_factory.mktemp("sizes") / "data")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "resenc"
    write_tiny_encoder("resenc", folder)
    return folder


def test_crops_come_with_what_is_known_of_their_subject(sizes, tmp_path):
    volumes = prepared(sizes, tmp_path)
    taken = [n for n in NETWORKS["resenc"] if not n.startswith("mask")]
    recipe = load_recipe(finetune_volumes.DEMO, taken, finetune_volumes.WholeVolumesRecipe)
    stream = finetune_volumes.build_stream(volumes, recipe)
    samples = [stream[n] for n in range(6)]
    known = torch.arange(len(volumes.manifest.subjects[0])) * 10.0
    targets = Targets(known, 1 + known, torch.zeros(1))
    batch = finetune_volumes.make_batch(stack_views(samples), torch.device("cpu"), recipe, targets)
    drawn = [volumes.subjects[stream._choose(np.random.default_rng(stream._seed(n, "geometry")))[0]] for n in range(6)]
    assert batch["labels"].tolist() == [10.0 * subject for subject in drawn]
    assert batch["weights"].tolist() == [1 + 10.0 * subject for subject in drawn]
    assert len(set(drawn)) > 1


def arguments(*given):
    return finetune_volumes.parse_arguments("", [str(part) for part in given])


def test_what_a_user_can_mend_is_one_line(encoder, sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--encoder", encoder, "--data", sizes]
    main = finetune_volumes.main
    with pytest.raises(ValueError, match="name --encoder PATH_OR_HUB_ID, or train --from-scratch"):
        main(arguments("--data", sizes))
    with pytest.raises(ValueError, match="name --targets TABLE"):
        main(arguments(*given))
    with pytest.raises(ValueError, match="is of the volumes of --data FOLDER: name both"):
        main(arguments(*given[:2], "--targets", sizes / "table.csv"))
    with pytest.raises(ValueError, match="no column age among its columns path, size, kind"):
        main(arguments(*given, "--targets", sizes / "table.csv", "data.target=age"))
    segmentation_class("resenc").from_encoder(load_encoder(encoder), {0: "no", 1: "one"}).save_pretrained(
        tmp_path / "seg"
    )
    with pytest.raises(ValueError, match="it is a ResEncForSegmentation: give the encoder that it was fine-tuned from"):
        main(arguments("--encoder", tmp_path / "seg", "--data", sizes, "--targets", sizes / "table.csv"))
    recipe = ["--recipe", ROOT / "recipes" / "segmentation_resenc_l.yaml"]
    with pytest.raises(ValueError, match=r"is of the method segmentation, for finetune\.py"):
        main(arguments(*given, "--targets", sizes / "table.csv", *recipe))
    recipe = ["--recipe", ROOT / "recipes" / "classification_primus_m.yaml"]
    with pytest.raises(ValueError, match=r"is of the method whole_volumes, for finetune_volumes\.py"):
        finetune.main(finetune.parse_arguments("", [str(a) for a in (*given, "--labels", sizes, *recipe)] + ONE_CLASS))
    for name, row, said in (
        ("nan", "case_0.nii.gz,nan", "line 2 has no kind"),
        ("alone", "a,1\nb,2\nc,1", "class 2 has one subject of 3"),
        ("same", "a,1\nb,1", "all 2 subjects are of one class"),
    ):
        (tmp_path / f"{name}.csv").write_text(f"path,kind\n{row}\n")
        classify = ["loss={name: cross_entropy, balanced: true}", "data.target=kind"]
        with pytest.raises(ValueError, match=said):
            main(arguments(*given, "--targets", tmp_path / f"{name}.csv", *classify))
    table = ["--targets", sizes / "table.csv", "data.target=kind"]
    classify = "loss={name: cross_entropy, balanced: true}"
    with pytest.raises(ValueError, match="write classes in quotation marks"):
        main(arguments(*given, *table, classify, "data.classes=[no, yes]"))
    with pytest.raises(ValueError, match="is of class 'never'; kind has 'no', 'yes'"):
        main(arguments(*given, *table, classify, 'data.classes=["no", "never"]'))
    with pytest.raises(ValueError, match="has 'no', which is no number: mend it, or train to classify"):
        main(arguments(*given, "--targets", sizes / "table.csv", "data.target=kind"))


ONE_CLASS = ["data.classes={background: 0, one: 1}"]


@pytest.mark.parametrize("kind", ["classification_primus_m", "regression_resenc_l"])
def test_recipes_are_read(kind):
    path = ROOT / "recipes" / f"{kind}.yaml"
    recipe = load_recipe(path, ["data.classes=[0, 1]"], finetune_volumes.WholeVolumesRecipe)
    assert recipe.data.classes == ["0", "1"]
    assert recipe.classifies == kind.startswith("classification")
    with pytest.raises(ValueError, match="two different classes or more"):
        load_recipe(path, ["data.classes=[a, a]"], finetune_volumes.WholeVolumesRecipe)


CLEAN = """
import sys, torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model.answers(model(torch.load("crop.pt")).logits), "answer.pt")
ours = {"models", "training", "losses", "data", "einops", "deepspeed"} & set(sys.modules)
assert not ours, ours
"""


@pytest.mark.slow
def test_a_run_leaves_a_model_that_predicts_is_published_and_goes_on(encoder, sizes, tmp_path, monkeypatch):
    output, split = tmp_path / "run", ["data.leave_out=[case_6.nii.gz, case_7.nii.gz]", "encoder.layer_decay=0.7"]
    given = ["--config", config("ddp"), "--encoder", encoder, "--data", sizes, "--targets", sizes / "table.csv"]
    given += ["--output", output, *split, "head.pooling=attention", *SHORT]
    done = launch(*given, script=ROOT / "finetune_volumes.py")
    assert "6 trained on, 2 left out" in done.stdout
    scores = json.loads((output / "scores.json").read_text())
    assert [(case["case"], case["true"]) for case in scores["cases"]] == [
        ("case_6.nii.gz", 23.0),
        ("case_7.nii.gz", 23.5),
    ]
    assert scores["summary"]["test"].keys() == {"mae", "r2", "mae_of_mean", "cases"}
    assert {path.name for path in (output / "report").iterdir()} == {"losses.png", "answers.png"}
    facts = json.loads((output / "model" / "finetuning.json").read_text())
    assert facts["origin"].startswith("resenc/model.safetensors (sha256")
    model = load_fine_tuned(output / "model").eval()
    assert model.config.target_mean == pytest.approx(np.mean([20, 20.5, 21, 21.5, 22, 22.5]))

    state = whole_state(output / "checkpoints" / "step_4")
    shutil.rmtree(output / "checkpoints" / "step_4")
    launch(*given, "--resume", "auto", script=ROOT / "finetune_volumes.py")
    again = whole_state(output / "checkpoints" / "step_4")
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert json.loads((output / "scores.json").read_text()) == scores
    assert len(read_metrics(output / "metrics.jsonl")) == 4
    other = tmp_path / "other.csv"
    other.write_text((sizes / "table.csv").read_text().replace("20.0", "25.0"))
    given[given.index(sizes / "table.csv")] = other
    shutil.rmtree(output / "checkpoints" / "step_4")
    refused = launch(*given, "--resume", "auto", script=ROOT / "finetune_volumes.py", check=False)
    assert "or the targets are not those" in refused.stderr

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    for case in (6, 7):
        shutil.copy(sizes / f"case_{case}.nii.gz", tmp_path / "in")
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"nothing")
    ask = [str(output), str(tmp_path / "in"), "--output", str(tmp_path / "answers")]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            predict.main(predict.parse_arguments(ask))
        assert end.value.code == 1, "one file is bad"
    header, *rows = (line.split(",") for line in (tmp_path / "answers" / "answers.csv").read_text().splitlines())
    assert header == ["path", "size"]
    expected = [case["predicted"] for case in scores["cases"]]
    assert [float(row[1]) for row in rows] == pytest.approx(expected, abs=0.02), "stored with 16 bits and not"
    with pytest.raises(ValueError, match="--labels and --probabilities are for models that segment"):
        predict.main(predict.parse_arguments([*ask, "--probabilities"]))

    bundle = tmp_path / "bundle"
    for source in (output, bundle):
        publish.main(publish.parse_arguments([str(source), "--to", str(bundle), "--license", "cc-by-4.0"]))
    card = (bundle / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "| test | " in card
    crop = torch.randn(1, 1, 32, 32, 32)
    torch.save(crop, tmp_path / "crop.pt")
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", CLEAN, bundle], cwd=tmp_path, env=environment, check=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "answer.pt"), model.answers(model(crop).logits))
    with pytest.raises(ValueError, match="give the encoder that it was fine-tuned from"):
        finetune_volumes.main(
            arguments("--encoder", output / "model", "--data", sizes, "--targets", sizes / "table.csv")
        )


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [[], ["data.target=kind", "loss={name: cross_entropy, balanced: true}"]])
def test_every_strategy_ends_alike(numbers, encoder, sizes, tmp_path):
    given = [encoder, sizes, "--targets", sizes / "table.csv", "data.leave_out=[case_6.nii.gz]", *numbers]
    found = {}
    for strategy, ranks in (("ddp", 1), ("zero3", 2), ("fsdp2", 2)):
        output = tmp_path / strategy
        run(output, *given, strategy=strategy, ranks=ranks, script="finetune_volumes")
        model = load_fine_tuned(output / "model").eval()
        with torch.no_grad():
            logits = model(torch.ones(1, 1, 32, 32, 32)).logits.flatten().tolist()
        found[strategy] = [*(row["loss"] for row in read_metrics(output / "metrics.jsonl")), *logits]
    for strategy in ("zero3", "fsdp2"):
        assert found[strategy] == pytest.approx(found["ddp"], rel=1e-3, abs=1e-3)
