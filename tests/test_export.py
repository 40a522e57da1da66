"""The headline command, whole, and its encoder in a clean process elsewhere."""

import ast
import json
import sys

import numpy as np
import pytest
import torch
from conftest import BIN, assert_same_features_in_a_clean_process, config, launch, model_state
from matplotlib.image import imread
from safetensors.torch import load_file

from models import ResEncModel
from training.metrics import read_held_out, read_metrics

pytestmark = pytest.mark.slow  # each test is a run of the script


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The README's first command, as it stands."""
    output = tmp_path_factory.mktemp("demo") / "run"
    done = launch("--config", config("zero2"), "--output", output, launcher=[BIN / "accelerate", "launch"])
    return output, done.stdout


def test_the_demo_learns(demo):
    output, said = demo
    assert said.startswith("This is the demo")
    assert "--data FOLDER" in said
    assert "DeepSpeed ZeRO-2, 1 rank" in said
    records = read_metrics(output / "metrics.jsonl")
    first, last = records[:10], records[-10:]
    for key, factor in (("reconstruction", 0.5), ("consistency", 0.5)):
        assert np.mean([r[key] for r in last]) < factor * np.mean([r[key] for r in first])
    assert all(r["feature_std"] > 0.3 for r in records)  # no collapse
    seen = read_held_out(output / "held_out.jsonl")[-1]
    assert seen["reconstruction"] < 0.85 * seen["reconstruction_by_interpolation"]


def test_the_pictures_are_drawn(demo):
    for name in ("losses", "reconstruction", "views"):
        picture = imread(demo[0] / "report" / f"{name}.png")
        assert min(picture.shape[:2]) > 300
        assert picture[..., :3].std() > 0.05


def test_the_encoder_folder_is_the_student(demo):
    encoder = load_file(demo[0] / "encoder" / "model.safetensors")
    module = model_state(demo[0] / "checkpoints" / "step_72")
    prefix = "student.features.encoder."
    assert set(encoder) == {key.removeprefix(prefix) for key in module if key.startswith(prefix)}
    assert all(torch.equal(encoder[key].flatten(), module[prefix + key]) for key in encoder)


def test_all_weights_are_kept_for_publishing(demo):
    kept, module = load_file(demo[0] / "pretraining.safetensors"), model_state(demo[0] / "checkpoints" / "step_72")
    assert kept.keys() == module.keys()
    assert all(torch.equal(kept[key].flatten(), module[key]) for key in kept)


def test_features_are_bit_identical_in_a_clean_process(demo, tmp_path):
    module = model_state(demo[0] / "checkpoints" / "step_72")
    assert_same_features_in_a_clean_process(demo[0] / "encoder", ResEncModel, module, (40, 40, 40), tmp_path)


def test_the_folder_says_how_to_prepare_a_volume(demo):
    settings = json.loads((demo[0] / "encoder" / "config.json").read_text())
    wanted = {"orientation": "RAS", "spacing": [3.0, 3.0, 3.0], "crop_size": [40, 40, 40]}
    assert wanted.items() <= settings["preprocessing"].items()
    assert "z-score" in settings["preprocessing"]["normalisation"]
    processor = json.loads((demo[0] / "encoder" / "preprocessor_config.json").read_text())
    assert all(processor[key] == settings["preprocessing"][key] for key in ("orientation", "spacing", "crop_size"))
    card = (demo[0] / "encoder" / "README.md").read_text()
    assert (demo[0] / "encoder" / "LICENSE").exists()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "40 x 40 x 40" in card


def test_the_model_s_code_needs_torch_and_transformers_only(demo):
    needed = {"modeling": {"torch", "transformers"}, "configuration": {"transformers"}}
    needed |= {
        "image": {"nibabel", "numpy", "torch", "transformers"},
        "nifti.py": {"nibabel", "numpy"},
        "normalisation.py": {"numpy"},
        "placement.py": {"numpy", "torch"},
        "volume.py": {"numpy", "scipy"},
    }
    for path in (demo[0] / "encoder").glob("*.py"):
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
        assert imported - set(sys.stdlib_module_names) <= needed[path.name.split("_")[0]], path
