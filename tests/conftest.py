"""Small volumes, a small recipe, and a way to run the script as a user does."""

import training.shared_cpu  # noqa: F401

# isort: split
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forked_runs import Forks
from safetensors import safe_open

from data.manifest import Preparation, read_manifest
from data.prepare_folder import prepare_folder
from data.prepare_volume import Job
from data.sources import Listing, Source, find_sources
from data.store import PreparedVolumes

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# the tests speak of CPU ranks, wherever they run; tests/test_gpu.py asks for more, also as a worker of pytest-xdist
GPUS = int(os.environ.setdefault("GPUS_OF_THE_TESTS", str(torch.cuda.device_count())))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
FORKS = Forks()
LONGEST = (  # files by their minutes, so that two processes which share them end together
    "strategies",
    "hub",
    "publish",
    "sources_to_encoder",
    "methods",
    "train",
    "export",
    "chaos",
    "slurm_script",
    "guards",
    "cluster",
    "extending",
    "train_alice",
    "streamed_run",
    "plan",
    "retrieval",
)

CLEAN = """
import sys, numpy, torch
from transformers import AutoModel
torch.set_num_threads(1)
encoder = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    features = encoder(torch.from_numpy(numpy.load("crop.npy"))).last_hidden_state
numpy.save("features.npy", features.numpy())
ours = {"models", "training", "losses", "data", "einops", "nibabel", "deepspeed"} & set(sys.modules)
assert not ours, ours
"""

PRIMUS = [  # what makes of the demo's recipe one of a small Primus
    "data.spacing=[1.0,1.0,1.0]",
    "views.shared.mirror=0.5",
    "mask.block=8",
    "model={architecture: primus, hidden_size: 192, num_hidden_layers: 4, num_attention_heads: 4, patch_size: 8, "
    "drop_path_rate: 0.0, decoder_layers: 1, feature_decoder_heads: 4}",
    "teacher={momentum: 0.98, final_momentum: 0.98, path: published}",
    "optimizer.learning_rate=2e-3",
]
TINY = [
    *PRIMUS,
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
    "train.precision=fp32",
    "train.warmup_steps=1",
    "run.checkpoint_every=2",
    "run.workers=0",
]


def prepared(
    source: Path,
    folder: Path,
    orientation="RAS",
    spacing=(1.0, 1.0, 1.0),
    workers=1,
    packed=False,
    labels=None,
    **how,
) -> PreparedVolumes:
    """The volumes of a folder, or one file, as a run has them."""
    one = source.is_file()
    listing = Listing(source.parent, [Source(source.name)], []) if one else find_sources(source, labels=labels)
    job = Job(folder, listing.root, Preparation(orientation, spacing, **how), packed, labels)
    assert prepare_folder(listing, job, workers) == 0
    return PreparedVolumes(read_manifest(folder))


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


def pytest_collection_modifyitems(items):
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


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
    root: Path = ROOT,
    check: bool = True,
    gpus: str = "",
) -> subprocess.CompletedProcess:
    """Run train_cva.py in its own processes, as plain python and torchrun would (forked), or by a launcher."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "CUDA_VISIBLE_DEVICES": gpus,
    }
    command = [str(part) for part in (script, *arguments)]
    if launcher is None and not gpus and FORKS.fit(os.environ):
        done = FORKS.run(command, cwd, [environment | rank for rank in places(ranks)])
    else:
        launcher = launcher or (torchrun(ranks) if ranks > 1 else [sys.executable])
        command = [*map(str, launcher), *command]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def torchrun(ranks: int) -> list:
    return [BIN / "torchrun", "--standalone", f"--nproc_per_node={ranks}"]


def places(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": 1}
    each = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{key: str(value) for key, value in place.items()} for place in each]


def config(name: str) -> Path:
    return ROOT / "ds_configs" / f"{name}.json"


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, flat, put together from what the ranks wrote; and what each kept for itself."""
    parts, state = {}, {}
    for path in sorted(checkpoint.glob("state_*.safetensors")):
        with safe_open(path, "pt") as file:
            starts = json.loads(file.metadata()["starts"])
            for name in file.keys():  # noqa: SIM118
                if name in starts:
                    parts.setdefault(name, []).append((starts[name], file.get_tensor(name)))
                else:
                    state[f"{path.stem}.{name}"] = file.get_tensor(name)
    return state | {name: torch.cat([part for _, part in sorted(found)]) for name, found in parts.items()}


def model_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The module's tensors in a checkpoint, flat."""
    return {name[6:]: tensor for name, tensor in whole_state(checkpoint).items() if name.startswith("model.")}


def assert_same_features_in_a_clean_process(folder, model_class, module, crop_size, tmp_path):
    """The encoder in `folder`, loaded elsewhere without this project, against the weights that the run holds."""
    crop = np.random.default_rng(0).normal(size=(2, 1, *crop_size)).astype(np.float32)
    np.save(tmp_path / "crop.npy", crop)
    (tmp_path / "clean.py").write_text(CLEAN)
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-I", "clean.py", folder], cwd=tmp_path, env=environment, check=True)

    prefix = "student.features.encoder."
    encoder = model_class(model_class.config_class.from_pretrained(folder)).eval()
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    encoder.load_state_dict({name: module[prefix + name].view(shape) for name, shape in shapes.items()})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        expected = encoder(torch.from_numpy(crop)).last_hidden_state.numpy()
    torch.set_num_threads(threads)
    assert np.array_equal(np.load(tmp_path / "features.npy"), expected)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def machines(tmp_path):
    from machines import Machines  # which imports this file

    machines = Machines(tmp_path)
    yield machines
    machines.kill()
