"""What the scripts do before anything else."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, blobs, config, launch, save_nifti

import train_cva
from training.launch import parse_arguments, read_launch
from training.recipe import load_recipe

SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP, which torch has on Linux")
@pytest.mark.parametrize(
    ("command", "chosen", "found"),
    [
        *(([ROOT / script, "--help"], {}, "GOMP_SPINCOUNT = '1000'") for script in SCRIPTS),
        (["-c", "import training.shared_cpu, torch"], {"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        (["-c", "import training.shared_cpu, torch"], {"OMP_WAIT_POLICY": "PASSIVE"}, "GOMP_SPINCOUNT = '0'"),
    ],
)
def test_threads_soon_sleep_while_they_wait_unless_the_user_has_said_otherwise(command, chosen, found):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE"} | chosen
    asked = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert found in asked.stderr


@pytest.mark.parametrize(
    ("given", "described"),
    [
        ([], "the MNI152 T1 template that nilearn ships"),
        (["--data-description", "mine"], "mine"),
        (["--data", "."], None),
        (["--data", ".", "--data-description", "ours"], "ours"),
    ],
)
def test_data_are_described_as_they_were(given, described, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.launch.end_at_once_if_asked", lambda: None)  # pytest has signals of its own
    save_nifti(tmp_path / "a.nii", blobs(0))
    recipe = load_recipe(train_cva.DEMO, TINY, train_cva.CVARecipe)
    assert read_launch(parse_arguments("", given), recipe).data_description == described


def test_a_network_that_gloo_does_not_find_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    done = launch("--config", config("ddp"), "--output", tmp_path / "run", *TINY, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("train_cva.py: "))
    assert "nowhere0" in line
    assert "set GLOO_SOCKET_IFNAME" in line


def test_compilation_without_a_compiler_is_one_line_with_the_remedy(tmp_path):
    code = "import torch; from training.runtime import check_compiler; check_compiler(torch.device('cpu'))"
    environment = {**os.environ, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    asked = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    *_, last = asked.stderr.strip().splitlines()
    assert asked.returncode == 1
    assert last.startswith("ValueError: run.compile=true: torch.compile does not work here (InvalidCxxCompiler")
    assert last.endswith("): install what is missing, or set run.compile=false")
    environment |= {"CXX": "g++"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=True)
