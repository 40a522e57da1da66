"""finetune.py and predict.py: what they take over, refuse, write and score."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, blobs, config, launch, save_nifti, whole_state
from transformers.modeling_outputs import SemanticSegmenterOutput

import finetune
import predict
import publish
import train_cva
from evaluation.cases import Scored, summarise
from evaluation.inference import class_probabilities
from finetuning.segmentation import warn_of_collapse
from finetuning.taken_over import numbers_of_encoder
from losses.segmentation import segmentation_objective
from models import load_encoder, load_segmentation, segmentation_class
from models.segmentation import Segmentation
from training.export import write_encoder
from training.metrics import read_metrics
from training.recipe import load_recipe
from training.student import build_student

V3 = "architecture: primus_v3, embed_widths: [4, 4, 6, 8],"
NETWORKS = {
    "primus": TINY,
    "primus_v3": [
        n.replace("architecture: primus,", "architecture: primus_v3, embed_widths: [4, 4, 6, 8],") for n in TINY
    ],
    "resenc": [
        "views.crop_size=[32,32,32]",
        "mask.block=16",
        "model={architecture: resenc, hidden_sizes: [4, 8, 16], strides: [1, 2, 2], depths: [1, 1, 1]}",
        "data.spacing=[1.0,1.0,1.0]",
    ],
}
SHORT = ["train.steps=4", "train.batch_size=4", "train.warmup_steps=1", "train.precision=fp32"]
SHORT += ["run.checkpoint_every=2", "run.workers=0"]


def write_tiny_encoder(network: str, folder: Path) -> torch.nn.Module:
    recipe = load_recipe(train_cva.DEMO, NETWORKS[network], train_cva.CVARecipe)
    encoder = build_student(recipe, reconstructs=False, dense=True, pooled=False).features.encoder
    folder.mkdir(parents=True)
    write_encoder(encoder, {}, "", folder)
    return encoder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    for network in NETWORKS:
        write_tiny_encoder(network, folder / network)
    return {network: folder / network for network in NETWORKS}


def write_labelled(folder: Path, cases: int = 4) -> Path:
    """Blobs, and what is bright in them: class 1, or 5 where it is very bright."""
    for case in range(cases):
        volume = blobs(case, (36, 40, 34))
        save_nifti(folder / "images" / f"case_{case}.nii.gz", volume)
        high, higher = np.quantile(volume, (0.8, 0.95))
        labels = np.select([volume > higher, volume > high], [5, 1]).astype(np.uint8)
        save_nifti(folder / "labels" / f"case_{case}.nii.gz", labels)
    names = {"background": 0, "bright": 1, "brightest": 5}
    (folder / "dataset.json").write_text(json.dumps({"labels": names}))
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled") / "data")


def arguments(*given):
    return finetune.parse_arguments("", [str(part) for part in given])


# --------------------------------------------------------------------------- what is taken over, and what is refused


@pytest.mark.parametrize("network", NETWORKS)
def test_a_recipe_describes_the_encoder_that_is_given(network, encoders):
    taken = [*numbers_of_encoder(str(encoders[network])), "data.classes={background: 0, one: 1}"]
    recipe = load_recipe(finetune.DEMO, taken, finetune.SegmentationRecipe)
    model, source = finetune.build_model(recipe), train_cva.build_model
    expected = load_recipe(train_cva.DEMO, NETWORKS[network], train_cva.CVARecipe)
    theirs = source(expected).student.features.encoder
    ours = model.student.features.encoder
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.config.preprocessing == theirs.config.preprocessing
    assert getattr(ours.config, "drop_path_rate", 0.0) == 0.0
    assert recipe.hidden == ""


def test_what_a_user_can_mend_is_one_line(encoders, labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = ["--encoder", encoders["primus"]]
    with pytest.raises(ValueError, match="name --encoder PATH_OR_HUB_ID, or train --from-scratch"):
        finetune.main(arguments("--data", labelled))
    with pytest.raises(ValueError, match="--data nowhere: no such folder or file"):
        finetune.main(arguments(*encoder, "--data", "nowhere"))
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a run that pretrains.*fine-tune what it made with finetune\.py"):
        predict.main(predict.parse_arguments([str(tmp_path / "run"), str(labelled), "--output", str(tmp_path / "m")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="name --labels FOLDER"):
        finetune.main(arguments(*encoder, "--data", tmp_path / "empty"))
    shutil.copytree(labelled, tmp_path / "unnamed")
    (tmp_path / "unnamed" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"no dataset\.json that names its classes.*data\.classes=\{background: 0"):
        finetune.main(arguments(*encoder, "--data", tmp_path / "unnamed"))
    for wrong in ("{one: 1}", "{one: 1, background: 0}", "{background: 0, one: 1, two: 1}", "{}"):
        with pytest.raises(ValueError, match="must name the background first, as 0"):
            finetune.main(arguments(*encoder, "--data", labelled, f"data.classes={wrong}"))
    none = "loss.dice_weight=0", "loss.cross_entropy_weight=0"
    with pytest.raises(ValueError, match="all weights are 0"):
        finetune.main(arguments(*encoder, "--data", labelled, *none))
    with pytest.raises(ValueError, match=r"is of the method cva, for train_cva\.py"):
        finetune.main(arguments(*encoder, "--data", labelled, "--recipe", ROOT / "recipes" / "primus_m.yaml"))
    with pytest.raises(ValueError, match=r"is of the method segmentation, for finetune\.py"):
        load_recipe(finetune.DEMO, [], train_cva.CVARecipe)


def test_a_collapse_is_told():
    with pytest.warns(UserWarning, match=r"step 20: 0\.00% .* the network has collapsed: lower optimizer"):
        warn_of_collapse(20, {"predicted_foreground": 0.0, "foreground": 0.1})
    warn_of_collapse(20, {"predicted_foreground": 0.05, "foreground": 0.1})
    warn_of_collapse(20, {"predicted_foreground": 0.0, "foreground": 0.0})


# --------------------------------------------------------------------------- learning rates of layers


@pytest.mark.parametrize("network", NETWORKS)
def test_the_learning_rate_decays_with_the_distance_from_the_decoder(network, encoders):
    taken = [*numbers_of_encoder(str(encoders[network])), "data.classes={background: 0, one: 1}"]
    recipe = load_recipe(finetune.DEMO, [*taken, "encoder.layer_decay=0.5"], finetune.SegmentationRecipe)
    model = finetune.build_model(recipe)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = model.parameter_groups()
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == dict(model.named_parameters()).keys()
    blocks = "stages" if network == "resenc" else "transformer.blocks"
    layers = max(int(name.split(f"{blocks}.")[1].split(".")[0]) for name in scale if f"{blocks}." in name) + 1
    for name, found in scale.items():
        inner = name.removeprefix("student.features.encoder.")
        if name.startswith("student.decoder.") or inner.startswith("transformer.norm."):
            assert found == 1.0, name
        elif inner.startswith(blocks):
            assert found == 0.5 ** (layers - int(inner.removeprefix(f"{blocks}.").split(".")[0])), name
        else:
            assert found == 0.5 ** (layers + 1), name


def test_without_decay_there_is_one_group():
    model = segmentation_class("resenc")
    config_class = model.config_class
    network = model(config_class(hidden_sizes=[4, 8], strides=[1, 2], depths=[1, 1], num_labels=2))
    composite = Segmentation(network, segmentation_objective, {"dice": 1.0})
    assert len(composite.parameter_groups()) == 1
    (group,) = Segmentation(network, segmentation_objective, {"dice": 1.0}, frozen=True).parameter_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in network.decoder.parameters()}


# --------------------------------------------------------------------------- whole volumes


class Brightness(torch.nn.Module):
    """Logits 0 and the voxel's value: what a voxel gets does not depend on the window that shows it."""

    def forward(self, crops):
        return SemanticSegmenterOutput(logits=torch.cat((torch.zeros_like(crops), crops), dim=1))


class Position(torch.nn.Module):
    """The second logit is the number of the voxel along X in its window."""

    def forward(self, crops):
        ramp = torch.arange(crops.shape[2], dtype=torch.float32)[:, None, None].expand(crops.shape[2:])
        logits = torch.stack((torch.zeros_like(ramp), ramp))
        return SemanticSegmenterOutput(logits=logits.expand(len(crops), -1, -1, -1, -1))


@pytest.mark.parametrize("size", [(8, 8, 8), (5, 20, 9), (21, 13, 17)])
@pytest.mark.parametrize("mirror", [False, True])
def test_each_voxel_gets_its_own_answer(size, mirror):
    volume = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    found = class_probabilities(Brightness(), volume, [-1.0], (8, 8, 8), 0.5, mirror, windows=3)
    expected = torch.stack((torch.zeros(size), volume[0])).softmax(dim=0)
    torch.testing.assert_close(found, expected)


def test_mirrored_copies_are_averaged_as_logits():
    volume = torch.zeros(1, 8, 8, 8)
    found = class_probabilities(Position(), volume, [0.0], (8, 8, 8), 0.5, True)
    assert found.shape == (2, 8, 8, 8)
    torch.testing.assert_close(found[1], torch.tensor(3.5).sigmoid().expand(8, 8, 8))  # 0..7 and 7..0
    once = class_probabilities(Position(), volume, [0.0], (8, 8, 8), 0.5, False)
    torch.testing.assert_close(once[1, :, 0, 0], torch.arange(8.0).sigmoid())


def test_a_small_volume_is_surrounded_by_its_own_padding():
    seen = []

    class Watch(Brightness):
        def forward(self, crops):
            seen.append(crops.clone())
            return super().forward(crops[:, :1])

    volume = torch.stack((torch.full((4, 8, 8), 5.0), torch.full((4, 8, 8), 6.0)))
    class_probabilities(Watch(), volume, [-1.0, -2.0], (8, 8, 8), 0.5, False)
    (crops,) = seen
    assert crops[0, 0, :, 0, 0].tolist() == [-1, -1, 5, 5, 5, 5, -1, -1]
    assert crops[0, 1, :, 0, 0].tolist() == [-2, -2, 6, 6, 6, 6, -2, -2]


def test_the_summary_leaves_out_what_has_no_score():
    nan = float("nan")
    rows = [("a", [1.0, nan]), ("b", [0.5, 0.0]), ("c", [nan, nan])]
    scored = [Scored(name, "test", {"dice": values}) for name, values in rows]
    found = summarise(scored, ["x", "y"])["test"]
    assert found["x"]["dice"]["value"] == pytest.approx(0.75)
    assert found["y"]["dice"]["value"] == 0.0
    assert found["mean"]["dice"]["value"] == pytest.approx((1.0 + 0.25) / 2)
    assert found["mean"]["cases"] == 3


# --------------------------------------------------------------------------- whole runs


def run(output, encoder, data, *more, strategy="ddp", ranks=1, script="finetune"):
    """A run that fine-tunes, by several_runs.py where it has several ranks: only it has FSDP2 on a CPU."""
    given = ["--config", config(strategy), "--encoder", encoder, "--data", data, "--output", output, *more, *SHORT]
    if ranks == 1:
        return launch(*given, script=ROOT / f"{script}.py")
    runs = output.with_suffix(".json")
    runs.write_text(json.dumps([{"script": script, "arguments": [str(argument) for argument in given]}]))
    launcher = [shutil.which("torchrun"), "--standalone", f"--nproc_per_node={ranks}"]
    done = launch(runs, script=ROOT / "tests" / "several_runs.py", launcher=launcher)
    assert "run 0 exit 0" in done.stdout, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def plain(encoders, labelled, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("plain") / "run"
    leave_out = "data.leave_out=[case_3.nii.gz]"
    run(output, encoders["resenc"], labelled, leave_out, "encoder.layer_decay=0.7")
    return output


@pytest.mark.slow
def test_a_run_leaves_a_model_and_scores_of_the_cases_left_out(plain, encoders, labelled, tmp_path, monkeypatch):
    scores = json.loads((plain / "scores.json").read_text())
    assert [(case["case"], case["group"]) for case in scores["cases"]] == [("images/case_3.nii.gz", "test")]
    assert scores["summary"]["test"].keys() == {"bright", "brightest", "mean"}
    report = {path.name for path in (plain / "report").iterdir()}
    assert {"losses.png", "held_out.png", "cases.png"} <= report
    card = (plain / "model" / "README.md").read_text()
    assert "| test | brightest |" in card
    assert "from encoders" not in card, "no path of this machine"
    facts = json.loads((plain / "model" / "finetuning.json").read_text())
    assert facts["classes"] == {"background": 0, "bright": 1, "brightest": 5}
    assert facts["origin"].startswith("resenc/model.safetensors (sha256")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    files = [shutil.copy(labelled / "images" / "case_3.nii.gz", tmp_path / "in")]
    (tmp_path / "in" / "bad.nii.gz").write_bytes(b"nothing")
    given = [str(plain), str(tmp_path / "in"), "--output", str(tmp_path / "masks"), "--no-mirror", "--probabilities"]
    given += ["--labels", str(labelled / "labels")]
    with pytest.raises(SystemExit) as end:
        predict.main(predict.parse_arguments(given))
    assert end.value.code == 1, "one file is bad"
    mask, source = nib.load(tmp_path / "masks" / "case_3.nii.gz"), nib.load(files[0])
    assert np.array_equal(mask.affine, source.affine)
    assert mask.shape == source.shape
    assert set(np.unique(mask.dataobj)) <= {0, 1, 5}
    probabilities = nib.load(tmp_path / "masks" / "case_3_probabilities.nii.gz").get_fdata()
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    values = np.array([0, 1, 5])
    assert np.array_equal(values[probabilities.argmax(-1)], np.asarray(mask.dataobj))
    again = json.loads((tmp_path / "masks" / "scores.json").read_text())["summary"]["labelled"]["mean"]["dice"]["value"]
    assert again == pytest.approx(scores["summary"]["test"]["mean"]["dice"]["value"], abs=0.02), "mirrored and not"

    before = (tmp_path / "masks" / "case_3.nii.gz").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        predict.main(predict.parse_arguments(given))
    assert (tmp_path / "masks" / "case_3.nii.gz").stat().st_mtime_ns == before, "what is there is not done again"
    with pytest.raises(ValueError, match="it is an encoder, which answers nothing yet"):
        predict.main(predict.parse_arguments([str(encoders["resenc"]), *given[1:]]))
    with pytest.raises(ValueError, match="give the encoder that it was fine-tuned from"):
        finetune.main(arguments("--encoder", plain / "model", "--data", labelled))
    with pytest.raises(ValueError, match="a run that fine-tunes: give the encoder that it was fine-tuned from"):
        finetune.main(arguments("--encoder", plain, "--data", labelled))


@pytest.mark.slow
def test_a_fine_tuned_model_is_published_with_its_scores(plain, tmp_path):
    bundle = tmp_path / "bundle"
    publish.main(publish.parse_arguments([str(plain), "--to", str(bundle), "--license", "cc-by-4.0"]))
    card = (bundle / "README.md").read_text()
    assert "license: cc-by-4.0" in card
    assert "| test | brightest |" in card
    assert f"python predict.py {bundle}" in card
    ours, theirs = load_segmentation(plain / "model"), load_segmentation(bundle)
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    publish.main(publish.parse_arguments([str(bundle), "--to", str(bundle)]))
    with pytest.raises(ValueError, match="no teacher"):
        publish.main(publish.parse_arguments([str(bundle), "--to", str(bundle), "--weights", "student"]))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), ("zero2", 2), ("fsdp2", 2)])
def test_every_strategy_ends_alike_and_goes_on_bit_for_bit(strategy, ranks, plain, encoders, labelled, tmp_path):
    output, leave_out = tmp_path / "run", "data.leave_out=[case_3.nii.gz]"
    given = [encoders["resenc"], labelled, leave_out, "encoder.layer_decay=0.7"]
    run(output, *given, strategy=strategy, ranks=ranks)
    losses, expected = ([r["loss"] for r in read_metrics(path / "metrics.jsonl")] for path in (output, plain))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    end = whole_state(output / "checkpoints" / "step_4")
    shutil.rmtree(output / "checkpoints" / "step_4")
    run(output, *given, "--resume", "auto", strategy=strategy, ranks=ranks)
    found = whole_state(output / "checkpoints" / "step_4")
    assert found.keys() == end.keys()
    assert all(torch.equal(found[name], end[name]) for name in end)
    crop = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (load_segmentation(path / "model").eval() for path in (output, plain))
    with torch.no_grad():
        torch.testing.assert_close(ours(crop).logits, theirs(crop).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_frozen_primus_keeps_its_encoder_and_a_budget_its_subjects(encoders, labelled, tmp_path):
    output = tmp_path / "run"
    done = run(output, encoders["primus"], labelled, "encoder.frozen=true", "data.budget=2")
    assert "2 trained on" in done.stdout
    model, source = load_segmentation(output / "model"), load_encoder(encoders["primus"])
    after = model.encoder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in source.state_dict().items())


def write_rare(folder: Path, cases: int = 9) -> Path:
    """Noise with one bright ball of 0.4 % of the voxels."""
    shape = 36, 40, 34
    for case in range(cases):
        rng = np.random.default_rng(case)
        distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - rng.uniform(8, 26, 3), axis=-1)
        ball = distance < 3.5
        save_nifti(folder / "images" / f"case_{case}.nii.gz", (rng.normal(size=shape) + 4 * ball).astype(np.float32))
        save_nifti(folder / "labels" / f"case_{case}.nii.gz", ball.astype(np.uint8))
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "ball": 1}}))
    return folder


@pytest.mark.slow
def test_a_primus_finds_what_is_rare_and_one_that_answers_background_says_so(encoders, tmp_path):
    given = ["--config", config("ddp"), "--encoder", encoders["primus"], "--data", write_rare(tmp_path / "data")]
    given += ["data.leave_out=[case_8.nii.gz]", *SHORT[1:], "run.checkpoint_every=60"]
    learned = launch(*given, "--output", tmp_path / "learned", "train.steps=120", script=ROOT / "finetune.py")
    scores = json.loads((tmp_path / "learned" / "scores.json").read_text())
    assert scores["summary"]["test"]["ball"]["dice"]["value"] > 0.5
    assert "step 120: 0.00% of the voxels held out" not in learned.stderr
    blind = ["loss.dice_weight=0", "views.foreground_share=0", "optimizer.learning_rate=1e-3", "train.steps=60"]
    collapsed = launch(*given, "--output", tmp_path / "collapsed", *blind, script=ROOT / "finetune.py")
    assert "step 60: 0.00% of the voxels held out are taken for foreground" in collapsed.stderr
    assert "the network has collapsed: lower optimizer.learning_rate" in collapsed.stderr
