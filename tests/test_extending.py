"""A consistency, a method and an encoder that the project does not know, added as CONTRIBUTING.md says.

tests/extensions/ holds what each takes; it is laid over a copy of the project, `*.append` at the end of a file of it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, config, launch
from safetensors.torch import load_file

from training.checkpoints import complete_checkpoints
from training.metrics import read_metrics

pytestmark = pytest.mark.slow

ROOMS = (
    "models",
    "losses",
    "data",
    "training",
    "planning",
    "evaluation",
    "pictures",
    "finetuning",
    "recipes",
    "ds_configs",
    "benchmarks",
    "tests",
)
COMMON = [number for number in TINY if not number.startswith(("model", "heads.", "views.cells"))]
PLAIN = ["model={architecture: plain, hidden_size: 12}", "views.cells=[3,3,3]"]
BRIGHT = [number for number in TINY if not number.startswith(("heads.", "teacher", "views.cells"))]
RUNS = {  # script, strategy, numbers
    "consistency": ("train_cva", "zero2", [*TINY, "loss.consistency=absolute"]),
    "method": ("train_brightness", "ddp", BRIGHT),
    "encoder": ("train_cva", "fsdp2", [*COMMON, *PLAIN]),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with all three in it."""
    folder = tmp_path_factory.mktemp("project")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "LICENSE"]:
        shutil.copy(file, folder)
    extensions = ROOT / "tests" / "extensions"
    for part in (path for path in extensions.rglob("*") if path.is_file()):
        place = folder / part.relative_to(extensions)
        if part.suffix == ".append":
            place = place.with_suffix("")
            place.write_text(place.read_text() + part.read_text())
        else:
            assert not place.exists()
            shutil.copy(part, place)
    return folder


@pytest.fixture(scope="module")
def runs(project, volumes):
    """Each is stopped after two steps, and taken up again."""
    planned = []
    for name, (script, strategy, numbers) in RUNS.items():
        arguments = ["--config", config(strategy), "--data", volumes, "--output", project / "runs" / name, *numbers]
        planned.append({"script": script, "arguments": [str(a) for a in arguments], "stop_at": 1})
        planned.append({"script": script, "arguments": [*map(str, arguments), "--resume", "auto"], "draws": True})
    (project / "runs.json").write_text(json.dumps(planned))
    script = project / "tests" / "several_runs.py"
    done = launch(project / "runs.json", script=script, ranks=2, root=project, cwd=project)
    ends = re.findall(r"^run \d+ exit (\d+),", done.stdout, re.MULTILINE)
    assert ends == ["75", "0"] * len(RUNS), done.stdout + done.stderr
    return project / "runs"


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_stops_goes_on_and_is_exported(runs, name):
    records = read_metrics(runs / name / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [path.name for path in complete_checkpoints(runs / name / "checkpoints")] == ["step_2", "step_4"]
    pictures = {path.name for path in (runs / name / "report").iterdir()}
    assert {"losses.png", "features_step_4.png"} <= pictures
    assert ("views.png" in pictures) == ("reconstruction.png" in pictures) == (name != "method")
    facts = json.loads((runs / name / "encoder" / "pretraining.json").read_text())
    assert facts["losses"].keys() == facts["method"]["terms"].keys()
    assert facts["losses"].keys() <= records[0].keys()


def publish(project, run, to):
    launch(run, "--to", to, script=project / "publish.py", root=project, cwd=project)
    return {file.name for file in to.iterdir()}, (to / "README.md").read_text()


FOR_NNUNET = {"checkpoint_final.pth", "adaptation_plan.json"}


def test_the_card_of_a_new_consistency_says_what_it_is(project, runs, tmp_path):
    files, card = publish(project, runs / "consistency", tmp_path / "bundle")
    assert "pretrained with Consistent View Alignment" in card
    assert "masked autoencoding, absolute agreement of two views and image-level contrast" in " ".join(card.split())
    assert "| consistency | absolute agreement of two views | " in card
    assert files >= FOR_NNUNET


def test_the_card_of_a_new_method_speaks_of_it_alone(project, runs, tmp_path):
    files, card = publish(project, runs / "method", tmp_path / "bundle")
    assert "# Primus encoder, pretrained with Brightness\n" in card
    assert "without labels by guessing how bright a crop is." in " ".join(card.split())
    assert "| brightness | guessing how bright a crop is | " in card
    assert "nobody 2026. Primus: Wald et al." in card
    assert "View Alignment" not in card
    assert files >= FOR_NNUNET
    content = torch.load(tmp_path / "bundle" / "checkpoint_final.pth", weights_only=True)
    assert content["trainer_name"] == content["citations"][0]["name"] == "Brightness"


LOAD = """
import sys, torch
from transformers import AutoModel
encoder = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert encoder(torch.zeros(1, 1, 32, 32, 32), stages=["stage1"]).feature_maps["stage1"].shape == (1, 12, 4, 4, 4)
torch.save(encoder.state_dict(), "weights.pt")
"""


def test_a_new_encoder_is_published_without_a_plan_for_a_network_that_nnunet_does_not_have(project, runs, tmp_path):
    files, card = publish(project, runs / "encoder", tmp_path / "bundle")
    assert "modeling_plain.py" in files
    assert not files & FOR_NNUNET
    assert "nnU-Net" not in card
    assert "nnunet" not in card
    assert "A 3D encoder (two convolutions, " in card
    assert "[1, 12, X/8, Y/8, Z/8]" in card
    publish(project, runs / "encoder", tmp_path / "bundle")  # its own kind may be renewed
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, tmp_path / "bundle"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    student = load_file(runs / "encoder" / "pretraining.safetensors")
    for name, tensor in torch.load(tmp_path / "weights.pt").items():
        assert torch.equal(tensor, student[f"student.features.encoder.{name}"])


def refused(project, script, *arguments):
    """The one line that says why."""
    done = launch(*arguments, script=project / script, root=project, cwd=project, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert Path(script).name == done.stderr.split(":")[0]
    return done.stderr


def test_a_recipe_is_for_its_own_script(project):
    line = refused(project, "train_cva.py", "--recipe", project / "recipes" / "brightness.yaml")
    assert "is of the method brightness, for train_brightness.py: run that script, or choose" in line
    line = refused(project, "train_brightness.py", "--recipe", project / "recipes" / "demo.yaml")
    assert "is of the method cva, for train_cva.py" in line
