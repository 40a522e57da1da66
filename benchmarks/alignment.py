"""How far apart compared features lie, and a picture of it.

    python benchmarks/alignment.py
    python benchmarks/alignment.py --picture docs/views.png

The dense features of a crop are replaced by the volume coordinates of their voxels, averaged over each feature cell;
aligned pairs of cells should then be equal. Prints the distance over many samples: the mean an axis, and the worst
cell. The picture shows two views of the demo volume, before and after each is turned on its own.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.demo import demo_volume
from data.nifti import read_volume
from data.resampling import cut_views, read_block
from data.views import alignment_points, draw_turn, sample_views, to_volume
from losses.cells import sample_cells
from models.features import DENSE_STRIDE, join_stages
from training.pictures import draw_alignment

CASES = [  # crop, volume
    ((160, 160, 160), (257, 257, 257)),
    ((128, 128, 128), (205, 205, 205)),
    ((160, 160, 160), (161, 170, 160)),
    ((160, 160, 160), (140, 180, 150)),
    ((96, 128, 64), (150, 150, 150)),
    ((256, 256, 32), (411, 301, 183)),
]
NEVER = {
    "mirror": 0.0,
    "rotation": {"probability": 0.0, "degrees": (30.0, 30.0, 30.0)},
    "zoom": {"probability": 0.0, "range": (0.7, 1.4)},
}
MIRROR = NEVER | {"mirror": 0.5}


def turn(degrees: tuple[float, float, float], zoom: tuple[float, float] = (0.7, 1.4)) -> dict:
    return {
        "mirror": 0.5,
        "rotation": {"probability": 1.0, "degrees": degrees},
        "zoom": {"probability": 1.0, "range": zoom},
    }


def two_views(seed: int, volume_size: tuple, crop_size: tuple, shared: dict, independent: dict) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    turns = [draw_turn(rng, chances) for chances in (shared, independent, independent)]
    return torch.from_numpy(sample_views(rng, volume_size, crop_size, (0.4, 0.8), 0.0, turns[0], turns[1:]))


def coordinate_field(affine: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    """`[3, X, Y, Z]`."""
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.double) for n in crop_size], indexing="ij"), -1)
    return to_volume(affine, index).movedim(-1, 0)


def measure(crop_size: tuple, volume_size: tuple, shared: dict, independent: dict, stride: int, trials: int) -> str:
    distances, reached = [], []
    for seed in range(trials):
        affines = two_views(seed, volume_size, crop_size, shared, independent)
        points, inside = alignment_points(affines, crop_size, (7, 7, 7), (2, 2, 2), (stride,) * 3)
        features = torch.stack([F.avg_pool3d(coordinate_field(affine, crop_size), stride) for affine in affines])
        cells = sample_cells(features, points, crop_size)
        distances.append((cells[0] - cells[1]).abs()[inside])
        reached.append(float(inside.float().mean()))
    distances = torch.cat(distances)
    mean = ", ".join(f"{axis:.1e}" for axis in distances.mean(0))
    return f"{mean} | {distances.max():.1e} | {100 * np.mean(reached):.0f} %"


def measure_stages(crop_size: tuple, volume_size: tuple, trials: int) -> dict[int, float]:
    """Mean distance in voxels, by stride, where the stages of a ResEnc are brought to one grid."""
    strides, distances = (1, 2, 4, 8, 16, 32), []
    for seed in range(trials):
        affines = two_views(seed, volume_size, crop_size, MIRROR, NEVER)
        points, _ = alignment_points(affines, crop_size, (7, 7, 7), (2, 2, 2), (DENSE_STRIDE,) * 3)
        fields = torch.stack([coordinate_field(affine, crop_size) for affine in affines])
        dense = join_stages(tuple(F.avg_pool3d(fields, stride) for stride in strides))
        cells = sample_cells(dense, points, crop_size)
        distances.append((cells[0] - cells[1]).unflatten(-1, (len(strides), 3)).norm(dim=-1).mean(0))
    return dict(zip(strides, torch.stack(distances).mean(0).tolist()))


def draw(path: Path) -> None:
    volume, crop_size = read_volume(demo_volume(), "RAS", (1.0, 1.0, 1.0)), (96, 96, 96)
    pairs = []
    for independent in (NEVER, turn((0.0, 0.0, 45.0), (0.8, 1.25))):  # in the plane that is drawn
        affines = two_views(5, volume.shape, crop_size, NEVER, independent)
        points, inside = alignment_points(affines, crop_size, (7, 7, 7), (2, 2, 2), (8, 8, 8))
        blocks, moved = zip(*(read_block(volume, affine.numpy(), crop_size, "linear") for affine in affines))
        pairs.append((cut_views(list(blocks), torch.stack(moved), crop_size, "linear")[:, 0], points, inside))
    titles = ("", "turned on its own: ")
    draw_alignment(*(list(part) for part in zip(*pairs)), path, planes=(("axial", 2),), titles=titles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--picture", type=Path, help="draw this file instead")
    arguments = parser.parse_args()
    if arguments.picture:
        draw(arguments.picture)
        return
    print("| crop | volume | stride | turned | mean distance (voxels: X, Y, Z) | worst cell | cells compared |")
    print("|---|---|---|---|---|---|---|")
    for crop_size, volume_size in CASES:
        degrees = (0.0, 0.0, 30.0) if max(crop_size) > 3 * min(crop_size) else (30.0, 30.0, 30.0)
        every = turn(degrees)
        for stride in (8, 16):
            for name, shared, independent in (
                ("mirrored", MIRROR, NEVER),
                ("together", every, NEVER),
                ("each on its own", every, every),
            ):
                row = measure(crop_size, volume_size, shared, independent, stride, arguments.trials)
                sizes = [" x ".join(map(str, size)) for size in (crop_size, volume_size)]
                print(f"| {sizes[0]} | {sizes[1]} | {stride} | {name} | {row} |", flush=True)
    print("\nDistance in the stages of a ResEnc, mean, by stride (crops of 128^3 from 205^3, mirrored):")
    stages = measure_stages((128, 128, 128), (205, 205, 205), arguments.trials)
    print(", ".join(f"{stride}: {distance:.1e}" for stride, distance in stages.items()))


if __name__ == "__main__":
    main()
