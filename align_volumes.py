"""Align prepared volumes by the features of an encoder, for methods that compare the same place of two patients.

    python align_volumes.py --encoder runs/primus_m/encoder --prepared PREPARED

Writes PREPARED/frames.npz: for each volume an affine from its voxels to a frame that all patients share. Without it
that frame is by the moments of the foreground alone (level 0). Cells of each volume's foreground are matched with those
of one reference volume by the cosine of their dense features, and an affine is fitted to those that find each other;
where that fails, level 0 is kept and the reason said. Where the foreground is smaller than a head, all mm below shrink
with it. Runs that use frames know them by their fingerprint: a resumed one must have the same. To go back to level 0,
remove the file. Killed, it has written nothing: run it again.
"""

import argparse
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from data.alignment import Alignment, Cells, Numbers, align
from data.frames import Frames, compose, frames_by_moments, inverse, write_frames
from data.manifest import read_manifest
from data.store import PreparedVolumes
from data.stored_volume import Volume
from data.volume import axis_order
from models import dense_features, load_encoder
from training.command_line import run as run_script

FINE = 8.0  # mm: where cells are larger, those of the reference overlap, or matches would be too coarse for an affine
SHOWN = 20  # volumes that keep level 0 and are named


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, Numbers()
    add("--encoder", type=Path, required=True, metavar="FOLDER", help="of a run on volumes prepared in the same way")
    add("--prepared", type=Path, required=True, metavar="PREPARED", help="folder of prepare_data.py")
    add("--reference", metavar="SOURCE", help="the volume to align to, as the manifest has it (default: the first)")
    add("--reach", type=float, default=default.reach, help="mm around level 0's guess to look in (%(default)s)")
    add("--back", type=float, default=default.back, help="mm within which the way back must end (%(default)s)")
    add("--scale", type=float, default=default.scale, help="mm, residual that halves a weight (%(default)s)")
    add("--matches", type=int, default=default.matches, help="fewest that an affine is fitted to (%(default)s)")
    add("--tile", type=int, nargs=3, help="voxels that the encoder reads at once (default: the crop it was trained on)")
    add("--batch-size", type=int, default=8, help="tiles at a time (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser.parse_args(arguments)


def check_preparation(encoder: PreTrainedModel, volumes: PreparedVolumes) -> None:
    """Raise ValueError if the encoder was trained on volumes that were prepared otherwise."""
    how, asked = volumes.manifest.preparation, encoder.config.preprocessing or {}
    there = {"spacing": volumes.spacing, **{key: getattr(how, key) for key in ("orientation", "intensity")}}
    there |= {"intensity_of_ct": how.intensity_of_ct, "channels": list(how.channels)}
    other = [f"{key} {there[key]} is not {asked[key]}" for key in there if key in asked and there[key] != asked[key]]
    if other:
        raise ValueError(
            f"{volumes.manifest.folder} was prepared otherwise than the encoder was trained ({'; '.join(other)}): "
            "choose the encoder of a run on it, or prepare again into another folder"
        )


@torch.no_grad()
def cell_size(encoder: PreTrainedModel, tile: tuple[int, ...]) -> int:
    """Voxels of an axis of a cell of the dense features."""
    maps = dense_features(encoder, torch.zeros(1, encoder.config.num_channels, *tile, device=encoder.device))
    cell = round(tile[0] / maps.shape[2])
    if any(size != cell * cells for size, cells in zip(tile, maps.shape[2:])):
        raise ValueError(f"--tile {' '.join(map(str, tile))}: each must be a multiple of {cell}, the voxels of a cell")
    if min(tile) <= 2 * cell:
        raise ValueError(f"tiles of {list(tile)} voxels have no inner cells of {cell}: give a larger --tile")
    return cell


def foreground_cells(
    volume: Volume,
    encoder: PreTrainedModel,
    tile: tuple[int, ...],
    cell: int,
    batch_size: int,
    apart: float | None = None,
) -> Cells:
    """The cells of which half is foreground, their features without the mean over them.

    Args:
        tile, cell: in voxels along the axes of crops.
        apart: mm between cells at most; larger ones overlap then, else none do.
    """
    order = list(axis_order(volume.spacing, (encoder.config.preprocessing or {}).get("coarsest_last", False)))
    voxels = torch.from_numpy(np.float32(volume[:, :, :])).reshape(-1, *volume.shape)
    voxels = voxels.permute(0, *(axis + 1 for axis in order))
    padding, threshold = (
        torch.from_numpy(np.float32(number).reshape(-1, 1, 1, 1))
        for number in (volume.padding, volume.foreground_threshold)
    )
    foreground = (voxels > threshold).any(0, keepdim=True).float()
    features, places = [], []
    steps = [min(cell, max(1, int(apart / volume.spacing[axis]))) if apart else cell for axis in order]
    for before in itertools.product(*(range(0, cell, step) for step in steps)):  # voxels that the first cells lie early
        maps = dense_maps(voxels - padding, before, padding, encoder, tile, cell, batch_size)
        ends = [end - n - size for end, n, size in zip(np.multiply(cell, maps.shape[:3]), before, voxels.shape[1:])]
        around = [side for pair in zip(reversed(before), reversed(ends)) for side in pair]
        inside = F.avg_pool3d(F.pad(foreground, around), cell)[0] >= 0.5
        features.append(maps[inside.to(maps.device)])
        places.append(cell * inside.nonzero().numpy() + (cell - 1) / 2 - before)
    features, places = torch.cat(features), np.concatenate(places)[:, np.argsort(order)]
    return Cells(F.normalize(features - features.mean(0), dim=1), places * volume.spacing)


@torch.no_grad()
def dense_maps(
    voxels: torch.Tensor,
    before: tuple[int, ...],
    padding: torch.Tensor,
    encoder: PreTrainedModel,
    tile: tuple[int, ...],
    cell: int,
    batch_size: int,
) -> torch.Tensor:
    """Features `[x, y, z, D]` of the cells of a volume, the first of which begins some voxels `before` it.

    Tiles overlap by two cells, and each loses the cells along its border, which see less of what is around them.

    Args:
        voxels: `[C, X, Y, Z]`, counted from `padding` `[C, 1, 1, 1]`.
    """
    inner = [size - 2 * cell for size in tile]
    counts = [-(-(size + n) // step) for size, n, step in zip(voxels.shape[1:], before, inner)]
    after = [count * step - size - n for count, step, size, n in zip(counts, inner, voxels.shape[1:], before)]
    padded = F.pad(voxels, [side + cell for pair in zip(reversed(before), reversed(after)) for side in pair]) + padding
    for axis, (size, step) in enumerate(zip(tile, inner), start=1):
        padded = padded.unfold(axis, size, step)  # ends as [C, a, b, c, X, Y, Z]
    places, maps = list(np.ndindex(*counts)), []
    for first in range(0, len(places), batch_size):
        tiles = torch.stack([padded[:, a, b, c] for a, b, c in places[first : first + batch_size]])
        maps.append(dense_features(encoder, tiles.to(encoder.device))[:, :, 1:-1, 1:-1, 1:-1].float())
    grid = [count * step // cell for count, step in zip(counts, inner)]
    return torch.cat(maps).unflatten(0, counts).permute(0, 4, 1, 5, 2, 6, 3).reshape(*grid, -1)


def align_all(
    volumes: PreparedVolumes,
    encoder: PreTrainedModel,
    reference: int,
    tile: tuple[int, ...],
    batch: int,
    numbers: Numbers,
) -> tuple[Frames, list[Alignment]]:
    """Frames of the rows of the manifest, and how each volume but the reference was aligned."""
    frames, cell = frames_by_moments(volumes.manifest), cell_size(encoder, tile)
    first, found = foreground_cells(volumes[reference], encoder, tile, cell, batch, FINE), []
    of_reference = _in_mm(volumes, frames, reference)
    numbers = numbers.scaled(min(1.0, np.linalg.det(of_reference[:, :3]) ** (-1 / 3)))  # what is smaller than a head
    for number in tqdm(range(len(volumes)), desc="aligning volumes", unit="volume"):
        rows = volumes.rows_of(number)
        if number != reference:
            guess = compose(inverse(of_reference), _in_mm(volumes, frames, number))
            cells = foreground_cells(volumes[number], encoder, tile, cell, batch)
            found.append(align(cells, first, guess, numbers))
            if found[-1].reason:
                continue
            spacing = np.column_stack((np.diag(volumes[number].spacing), np.zeros(3)))
            frames.volume_to_frame[rows] = compose(of_reference, compose(found[-1].affine, spacing))
            frames.level[rows] = 1
    frames.level[volumes.rows_of(reference)] = frames.level.any()
    return frames, found


def _in_mm(volumes: PreparedVolumes, frames: Frames, number: int) -> np.ndarray:
    """The frame of a volume, from mm along its axes instead of voxels."""
    frame = frames.volume_to_frame[volumes.rows_of(number)[0]]
    return np.column_stack((frame[:, :3] / volumes[number].spacing, frame[:, 3]))


def fingerprint(encoder: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def report(volumes: PreparedVolumes, reference: int, found: list[Alignment]) -> None:
    """What was done, in words."""
    others = [number for number in range(len(volumes)) if number != reference]
    kept = [(number, one.reason) for number, one in zip(others, found) if one.reason]
    for number, reason in kept[:SHOWN]:
        print(f"level 0     {volumes.name(number)}: {reason}")
    if len(kept) > SHOWN:
        print(f"            and {len(kept) - SHOWN} more")
    print(f"aligned     {len(found) - len(kept)} of {len(found)} volumes to {volumes.name(reference)}")
    fitted = np.array([(one.matches, one.before, one.after) for one in found if not one.reason])
    if len(fitted):
        print("            a volume   matches   residual of level 0, mm   of level 1, mm")
        for what, (matches, before, after) in zip(
            ("least", "median", "most"), np.quantile(fitted, (0, 0.5, 1), axis=0)
        ):
            print(f"            {what:8s} {matches:9.0f} {before:25.1f} {after:16.1f}")


def main(arguments: argparse.Namespace) -> None:
    torch.backends.cudnn.allow_tf32 = False  # the file should depend on the machine as little as it can
    volumes = PreparedVolumes(read_manifest(arguments.prepared))
    encoder = load_encoder(arguments.encoder).eval().to(arguments.device)
    check_preparation(encoder, volumes)
    names = [volumes.name(number) for number in range(len(volumes))]
    if arguments.reference not in (None, *names):
        raise ValueError(f"--reference {arguments.reference}: no volume of {arguments.prepared}, such as {names[0]}")
    reference = names.index(arguments.reference) if arguments.reference else 0
    tile = tuple(arguments.tile or encoder.config.image_size)
    numbers = Numbers(arguments.reach, arguments.back, arguments.scale, matches=arguments.matches)
    frames, found = align_all(volumes, encoder, reference, tile, arguments.batch_size, numbers)
    report(volumes, reference, found)
    facts = {"encoder": fingerprint(encoder), "reference": names[reference], "numbers": json.dumps(numbers._asdict())}
    print(f"frames      {write_frames(volumes.manifest, frames, **facts)} ({frames.fingerprint()})")


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments()))
