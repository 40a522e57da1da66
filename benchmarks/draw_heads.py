"""Draw MR images of real anatomies from label maps of whole heads: a second task for evidence.py, with exact labels.

    python benchmarks/draw_heads.py --maps BRAIN_LABELS --output HEADS
    python benchmarks/evidence.py 'data.spacing=[1.5,1.5,1.5]' --data HEADS/labelled --pretrain-on HEADS/unlabelled \
        --output runs/heads

BRAIN_LABELS has label maps of whole heads, one a person, and `priors/`: those that SynthSeg is trained with (Billot et
al. 2023, Medical Image Analysis 86, Apache-2.0), whose way of drawing this follows. Each label gets a mean and a
spread, every voxel a draw from them; the image is blurred and shaded. A volume is a box of 56^3 voxels of 1.5 mm at a
random place of a brain, turned by up to 15 degrees, so where a voxel lies in it tells little of what it is.

HEADS/labelled has T1-like images, with 8 structures; HEADS/unlabelled has other boxes of the same people, in contrasts
drawn at random, which never are those of T1 but by chance. Synthetic images of real anatomies: say so beside results.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter, zoom
from scipy.spatial.transform import Rotation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.command_line import run as run_script

SIZE, SPACING = 56, 1.5  # voxels of a box on each axis; mm
TURN, ZOOM, SHIFT = 15, 0.1, 15  # degrees; logarithm of sizes; mm from a voxel of the brain to the middle of a box
BLUR, SHADE = (0.4, 1.0), 0.25  # voxels; standard deviation of the logarithm of shading
MEANS, SPREADS = (10, 240), (3, 25)  # of a tissue in a random contrast
STRUCTURES = {  # FreeSurfer's numbers, left and right
    "white matter": (2, 41),
    "cortex": (3, 42),
    "ventricles": (4, 5, 43, 44, 14, 15, 72),
    "thalamus": (10, 49),
    "striatum and pallidum": (11, 12, 13, 26, 50, 51, 52, 58),
    "hippocampus and amygdala": (17, 18, 53, 54),
    "cerebellum": (7, 8, 46, 47),
    "brain stem": (16, 28, 60),
}


class Priors(NamedTuple):
    """Numbers of SynthSeg, for labels `[N]`."""

    labels: np.ndarray  # [N]
    random: np.ndarray  # [N], which share an intensity in a random contrast
    t1: np.ndarray  # [N], which do in T1
    means: np.ndarray  # [2, classes of T1], mean and spread
    spreads: np.ndarray


def read_priors(folder: Path) -> Priors:
    names = ("labels", "classes", "classes_contrast_specific")
    numbers = [np.load(folder / f"generation_{name}.npy").astype(int) for name in names]
    return Priors(*numbers, *(np.load(folder / f"prior_{name}_t1.npy") for name in ("means", "stds")))


def intensities(priors: Priors, t1: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread by label, `[largest label + 1]`; background is 0."""
    if t1:
        mean, spread = (rng.normal(*table) for table in (priors.means, priors.spreads))
        mean, spread = mean[priors.t1], spread[priors.t1]
    else:
        classes = priors.random.max() + 1
        mean, spread = (rng.uniform(*limits, classes)[priors.random] for limits in (MEANS, SPREADS))
    by_label = np.zeros((2, priors.labels.max() + 1), np.float32)
    by_label[:, priors.labels] = np.maximum(mean, 0), np.maximum(spread, 0)
    by_label[:, 0] = 0
    return by_label[0], by_label[1]


def cut(labels: np.ndarray, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A box `[SIZE, SIZE, SIZE]` of a map `[X, Y, Z]` of 1 mm, nearest.

    Args:
        brain: places of its voxels `[N, 3]`.
    """
    turned = Rotation.from_euler("xyz", rng.uniform(-TURN, TURN, 3), degrees=True).as_matrix()
    matrix = turned * SPACING * np.exp(rng.uniform(-ZOOM, ZOOM, 3))
    middle = brain[rng.integers(len(brain))] + rng.uniform(-SHIFT, SHIFT, 3)
    offset = middle - matrix @ np.full(3, (SIZE - 1) / 2)
    return affine_transform(labels, matrix, offset, (SIZE,) * 3, order=0)


def draw(labels: np.ndarray, mean: np.ndarray, spread: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image `[SIZE, SIZE, SIZE]` of a map of labels, 0 where there is none."""
    noise = rng.standard_normal(labels.shape, dtype=np.float32)
    image = gaussian_filter(mean[labels] + spread[labels] * noise, rng.uniform(*BLUR))
    shade = zoom(rng.normal(0, SHADE, (3, 3, 3)), SIZE / 3, order=3)[:SIZE, :SIZE, :SIZE]
    return np.where(labels > 0, np.clip(image * np.exp(shade), 0, None), 0).astype(np.float32)


def save(voxels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([SPACING] * 3 + [1])), path)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--maps", type=Path, required=True, help="folder with *.nii.gz of labels, and priors/")
    add("--output", type=Path, required=True)
    add("--boxes", type=int, default=10, help="of each head, labelled and unlabelled each (%(default)s)")
    return parser.parse_args(arguments)


def main(asked: argparse.Namespace) -> None:
    paths = sorted(asked.maps.glob("*.nii*"))
    if not paths or not (asked.maps / "priors").is_dir():
        raise ValueError(f"--maps {asked.maps}: it must hold label maps (.nii, .nii.gz) and SynthSeg's priors/")
    priors = read_priors(asked.maps / "priors")
    largest = max(priors.labels.max(), *map(max, STRUCTURES.values()))
    to_structure = np.zeros(largest + 1, np.uint8)
    for number, values in enumerate(STRUCTURES.values(), 1):
        to_structure[list(values)] = number
    for person, path in enumerate(paths, 1):
        labels = np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj).astype(np.int16)
        brain = np.argwhere(to_structure[labels] > 0)
        for box in range(asked.boxes):
            for kind in ("unlabelled", "labelled"):
                t1 = kind == "labelled"
                rng = np.random.default_rng((person, box, int(t1)))
                part, name = cut(labels, brain, rng), f"sub-{person:02}_run-{box + 1:02}_T1w.nii.gz"
                image = draw(part, *intensities(priors, t1, rng), rng)
                if t1:
                    save(image, asked.output / kind / "images" / name)
                    save(to_structure[part], asked.output / kind / "labels" / name)
                else:
                    save(image, asked.output / kind / name.replace("T1w", "MR"))
        print(f"{path.name}: {asked.boxes} boxes of each kind, as sub-{person:02}", flush=True)


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments()))
