"""Small volumes, a small recipe, and a way to run the script as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent

TINY = [
    "views.crop_size=[32,32,32]",
    "views.cells=[3,3,3]",
    "model.hidden_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.feature_decoder_heads=2",
    "model.drop_path_rate=0.2",
    "heads.projector_size=32",
    "heads.predictor_size=16",
    "train.steps=4",
    "train.batch_size=4",
    "train.warmup_steps=1",
    "train.checkpoint_every=2",
    "data.workers=0",
]


def save_nifti(path: Path, volume: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume, np.diag([*spacing, 1.0])), path)
    return path


def blobs(seed: int, shape=(40, 44, 36)) -> np.ndarray:
    """A smooth positive volume with structure, int16."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    centres, widths = rng.uniform(-0.7, 0.7, (12, 3)), rng.uniform(0.1, 0.4, 12)
    volume = sum(np.exp(-((grid - c[:, None, None, None]) ** 2).sum(0) / w**2) for c, w in zip(centres, widths))
    return (1000 * volume + 50).astype(np.int16)


@pytest.fixture(scope="session")
def volumes(tmp_path_factory) -> Path:
    """A folder with three good volumes in two layouts."""
    folder = tmp_path_factory.mktemp("volumes")
    save_nifti(folder / "a.nii", blobs(0))
    save_nifti(folder / "sub-01" / "anat" / "b.nii.gz", blobs(1))
    save_nifti(folder / "sub-02" / "anat" / "c.nii.gz", blobs(2, (50, 40, 41)))
    return folder


def launch(
    *arguments,
    ranks: int = 1,
    launcher: list | None = None,
    script: Path = ROOT / "train_cva.py",
    cwd: Path = ROOT,
    check: bool = True,
) -> subprocess.CompletedProcess:
    """Run train_cva.py in its own processes: plain python for one rank, torchrun for more."""
    launcher = launcher or ([BIN / "torchrun", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    command = [str(part) for part in (*launcher, script, *arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def config(name: str) -> Path:
    return ROOT / "ds_configs" / f"{name}.json"


def model_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The module's tensors in a checkpoint of either engine."""
    if (checkpoint / "model.safetensors").exists():
        from safetensors.torch import load_file

        return load_file(checkpoint / "model.safetensors")
    return torch.load(checkpoint / "pytorch_model" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
