"""How far the frames that patients share are from the truth, on volumes whose structures are labelled.

    python benchmarks/frames.py --images DECATHLON/imagesTr --labels DECATHLON/labelsTr --spacing 1
    python benchmarks/frames.py --brain-labels SYNTHSEG --spacing 2     # label maps, and priors/ of their intensities

Prepares the volumes, trains a small Primus by CVA on them (cells of 4 voxels), aligns them with it and with the same
encoder untrained, and prints, for pairs of patients: how far the centre of a structure of one, carried to the other,
lies from that structure's centre there, and the Dice of the other's labels carried back. Of label maps, T1-like images
are drawn with the priors of SynthSeg (Billot et al. 2023): synthetic images of real anatomies.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter, zoom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align_volumes import align_all
from benchmarks.script_runs import in_new_process, train
from data.alignment import Numbers
from data.frames import carry, compose, frames_by_moments, inverse
from data.manifest import Preparation, read_manifest
from data.prepare_folder import prepare_folder
from data.prepare_volume import Job
from data.sources import find_sources
from data.store import PreparedVolumes
from data.stored_volume import open_volume
from models import load_encoder
from train_cva import CVARecipe, build_model, write_results
from training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "recipes" / "demo.yaml"
SMALL = [
    "views.crop_size=[32,32,32]",
    "views.overhang=0.25",
    "mask.block=4",
    "model={architecture: primus, hidden_size: 96, num_hidden_layers: 4, num_attention_heads: 4, patch_size: 4, "
    "drop_path_rate: 0.0, decoder_layers: 1, feature_decoder_heads: 4}",
    "optimizer.learning_rate=2e-3",
    "train.batch_size=8",
    "run.workers=0",
]
FEWEST = 50  # voxels of a structure that counts
HIGHEST = 500  # labels from here on, SynthSeg's of what is outside of the brain, count for nothing

Carry = Callable[[int, int, np.ndarray], np.ndarray]  # places of one volume in voxels -> of another


def draw_heads(maps: Path, images: Path, labels: Path) -> None:
    """A T1-like image of each label map: a value for each class, texture, a bias field, blur; air is 0."""
    priors = {file.stem: np.load(file) for file in (maps / "priors").glob("*.npy")}
    names, classes = priors["generation_labels"], priors["generation_classes_contrast_specific"]
    for number, file in enumerate(sorted(maps.glob("*.nii.gz"))):
        rng, image = np.random.default_rng(number), nib.load(file)
        label = np.asarray(image.dataobj).astype(np.int16)
        of = np.zeros(names.max() + 1, int)
        of[names] = classes
        means, stds = (np.abs(rng.normal(*priors[f"prior_{what}_t1"])) for what in ("means", "stds"))
        voxels = rng.normal(means[of[label]], stds[of[label]] / 2).astype(np.float32)
        bias = zoom(rng.normal(0, 0.2, (4, 4, 4)), np.divide(label.shape, 4), order=1)
        voxels = np.maximum(gaussian_filter(voxels, 0.7) * np.exp(bias), 0) * (label > 0)
        for folder, array in ((images, voxels.astype(np.int16)), (labels, label)):
            folder.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, image.affine), folder / file.stem)  # .nii, which is faster to write


def prepare(images: Path, labels: Path, folder: Path, spacing: float, most: int | None) -> PreparedVolumes:
    listing = find_sources(images, labels=labels)
    listing = listing._replace(sources=listing.sources[:most])
    job = Job(folder, listing.root, Preparation("RAS", (spacing,) * 3), labels=labels)
    assert prepare_folder(listing, job, 2) == 0
    return PreparedVolumes(read_manifest(folder))


def by_frames(frames: np.ndarray) -> Carry:
    return lambda a, b, places: carry(compose(inverse(frames[b]), frames[a]), places)


def measure(labels: list[np.ndarray], spacing: float, pairs: list[tuple[int, int]], way: Carry) -> tuple[float, float]:
    """Mean distance of centres in mm, and mean Dice, over structures and pairs."""
    distances, dices = [], []
    for a, b in pairs:
        places = np.argwhere(labels[a] >= 0)
        there = np.round(way(a, b, places)).astype(int)
        inside = ((there >= 0) & (there < labels[b].shape)).all(1)
        carried = np.zeros(len(places), labels[b].dtype)
        carried[inside] = labels[b][tuple(there[inside].T)]
        ours = labels[a].reshape(-1)
        both, sizes = (np.bincount(found, minlength=HIGHEST) for found in (ours[ours == carried], carried))
        (of_a, centres), (of_b, goals) = (_centres(labels[number]) for number in (a, b))
        known = np.flatnonzero((np.minimum(of_a, of_b) >= FEWEST) & (np.arange(HIGHEST) > 0))
        distances += (spacing * np.linalg.norm(way(a, b, centres[known]) - goals[known], axis=1)).tolist()
        dices += (2 * both[known] / (of_a[known] + sizes[known])).tolist()
    return float(np.mean(distances)), float(np.mean(dices))


def _centres(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of each structure, and the mean of their places."""
    sizes = np.bincount(label.reshape(-1), minlength=HIGHEST)
    places = np.argwhere(label >= 0)
    sums = [np.bincount(label.reshape(-1), along, minlength=HIGHEST) for along in places.T]
    return sizes, np.stack(sums, axis=1) / np.maximum(sizes, 1)[:, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--labels", type=Path)
    parser.add_argument("--brain-labels", type=Path, help="folder of SynthSeg's label maps, instead of the two")
    parser.add_argument("--spacing", type=float, default=1.0, help="mm that volumes are prepared at")
    parser.add_argument("--volumes", type=int, help="the first so many (default: all)")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--pairs", type=int, default=60, help="of patients that are measured")
    parser.add_argument("--folder", type=Path, help="to keep volumes and encoders in, and to find them again")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    images, labels = arguments.images, arguments.labels
    if arguments.brain_labels:
        images, labels = folder / "images", folder / "labels"
        if not images.exists():
            folder.mkdir(exist_ok=True)
            draw_heads(arguments.brain_labels, images, labels)
    volumes = prepare(images, labels, folder / "ready", arguments.spacing, arguments.volumes)
    overrides = [*SMALL, f"data.spacing={[arguments.spacing] * 3}", f"train.steps={arguments.steps}"]
    overrides += ["train.warmup_steps=20", f"run.checkpoint_every={arguments.steps}"]
    recipe = load_recipe(DEMO, overrides, CVARecipe)
    run = folder / f"run_{arguments.steps}"
    if not (run / "encoder").exists():
        command = ["--config", ROOT / "ds_configs" / "ddp.json", "--data", folder / "ready", "--output", run]
        in_new_process(train, [*command, *overrides], write_results)
    encoders = {
        "an untrained encoder": build_model(recipe).student.features.encoder.eval(),
        f"CVA, {arguments.steps} steps": load_encoder(run / "encoder").eval(),
    }
    level_0 = frames_by_moments(volumes.manifest).volume_to_frame
    sizes = np.array([volume.shape for volume in volumes])
    ways = {
        "same voxel": lambda a, b, places: places,
        "share of the box": lambda a, b, places: (places + 0.5) * sizes[b] / sizes[a] - 0.5,
        "level 0: moments": by_frames(level_0),
    }
    kept = {}
    for name, encoder in encoders.items():
        frames, found = align_all(volumes, encoder, 0, recipe.views.crop_size, 8, Numbers())
        ways[f"level 1: {name}"] = by_frames(frames.volume_to_frame)
        good = np.array([(one.matches, one.before, one.after) for one in found if not one.reason]).reshape(-1, 3)
        median = [f"{value:.1f}" for value in np.median(good, axis=0)] if len(good) else ["-"] * 3
        kept[f"level 1: {name}"] = [f"{len(found) - len(good)} of {len(found)}", *median]
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.choice(len(volumes), 2, replace=False).tolist()) for _ in range(arguments.pairs)]
    files = [folder / "ready" / file for file in volumes.manifest.volumes["label"].to_pylist()]
    label_maps = [np.where(label < HIGHEST, label, 0) for label in (open_volume(file)[:, :, :] for file in files)]
    print(f"{len(volumes)} patients, {len(pairs)} pairs; residuals in mm, medians over the volumes that were aligned\n")
    print("| place in the other patient | centres, mm | Dice | kept level 0 | matches | residual before | after |")
    print("|---|---|---|---|---|---|---|")
    for name, way in ways.items():
        distance, dice = measure(label_maps, arguments.spacing, pairs, way)
        print("|", " | ".join([name, f"{distance:.1f}", f"{dice:.3f}", *kept.get(name, [""] * 4)]), "|", flush=True)


if __name__ == "__main__":
    main()
