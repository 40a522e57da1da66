"""What a frozen encoder is worth, in minutes: beside itself untrained, the voxels alone, and their place alone.

    python benchmarks/evaluate_encoder.py runs/demo/encoder --data FOLDER
    python benchmarks/evaluate_encoder.py ORG/NAME --data FOLDER --labels FOLDER --budgets 1 2 5 10 20 40
    python benchmarks/evaluate_encoder.py ORG/NAME --data FOLDER --targets TABLE.csv --target age

Without labels: how often a place is found again in another view by its features alone (`retrieval`; by chance 1/64),
and how many directions they use (`rank`, RankMe). With labels, one map for each volume under its name: mean Dice on
volumes that are not labelled, of a linear probe and k nearest neighbours by the number of labelled volumes, and of
labels carried from one volume by its nearest features. With a table of what is known of subjects, as it is for
finetune_volumes.py: a linear probe and k nearest neighbours on means of features, each subject by others alone, with
bootstrap intervals. `--picture` draws the main components of the features of a few.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.nifti import read_image
from data.normalisation import BOX
from data.rows import subject_of
from data.sources import find_sources
from data.stored_volume import HeldVolume
from data.targets import as_classes, as_numbers, read_targets
from data.volume import BadVolume, axis_order, prepare, prepare_labels
from evaluation.dense_probe import dense_cells, number_labels
from evaluation.judge import evaluate_encoder, pool_cells, table
from evaluation.pooled_probe import pooled_scores
from evaluation.scores import Estimate
from models import architecture, load_encoder
from models.warm_start import find
from training.command_line import run as run_script
from training.pictures import draw_features, planes_of
from training.run_folder import RunFolder

SHOWN = 4  # volumes of a picture


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="a run, its encoder, a bundle, or the Hub id of one")
    add("--data", type=Path, required=True, metavar="FOLDER", help="of NIfTI volumes, or an index of them")
    add("--labels", type=Path, metavar="FOLDER", help="of their label maps")
    add("--targets", type=Path, metavar="TABLE", help="of what is known of subjects, .csv or .tsv")
    add("--target", metavar="COLUMN", help="of the table, numbers unless --classify")
    add("--classify", action="store_true", help="the column holds classes")
    add("--volumes", type=int, metavar="N", help="only the first N")
    add("--stride", type=int, help="voxels a cell (default: the encoder's own)")
    add("--samples", type=int, default=64, help="pairs of views (%(default)s)")
    add("--budgets", type=int, nargs="+", default=[1, 5], help="labelled volumes (%(default)s)")
    add("--draws", type=int, default=4, help="of labelled volumes (%(default)s)")
    add("--test", type=int, metavar="N", help="volumes to test on (default: a third)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--output", type=Path, metavar="FILE.json", help="write the numbers here, too")
    add("--picture", type=Path, metavar="FILE.png", help="draw the features of the first volumes")
    return parser.parse_args(arguments)


def open_encoder(source: str) -> PreTrainedModel:
    """An encoder that reads one channel, ready to be asked.

    Raises:
        ValueError: if it is none.
    """
    try:
        of_run = RunFolder(Path(source)).encoder
        encoder = load_encoder(of_run if of_run.is_dir() else find(source).parent).eval()
    except ValueError as error:
        raise ValueError(f"{error}; give the folder of a pretrained encoder, such as runs/NAME/encoder") from None
    if encoder.config.num_channels != 1:
        raise ValueError(
            f"{source} reads {encoder.config.num_channels} channels, and this command volumes of one: give an encoder "
            "of one channel"
        )
    return encoder


def read_volumes(
    data: Path, labels: Path | None, preprocessing: dict, most: int | None
) -> tuple[list[HeldVolume], list[torch.Tensor] | None, list[str]]:
    """Volumes as the encoder wants them, their labels, and whose they are; what cannot be used is named on stderr.

    Raises:
        ValueError: if there are none.
    """
    listing, how = find_sources(data, labels=labels), {"spacing": (1.0, 1.0, 1.0)} | preprocessing
    orientation = how.get("orientation", "RAS")
    rules = how.get("intensity", BOX), how.get("intensity_of_ct")
    volumes, maps, subjects = [], [], []
    for source in listing.sources[:most]:
        try:
            if labels and not source.label:
                raise BadVolume("it has no label map")
            image = read_image(listing.root / source.path, orientation)
            done = prepare(image.voxels, image.spacing, how["spacing"], *rules, source.modality)
            order = axis_order(done.spacing, how.get("coarsest_last", False))
            if labels:
                label = read_image(labels / source.label, orientation)
                if label.shape != image.shape or not np.allclose(label.affine, image.affine, atol=1e-2):
                    raise BadVolume(f"its label map {source.label} has another grid: resample it to the image's")
                label = prepare_labels(label.voxels, done.box, done.voxels.shape).transpose(order)
                maps.append(torch.from_numpy(np.ascontiguousarray(label).astype(np.int64)))
            voxels, spacing = np.ascontiguousarray(done.voxels.transpose(order)), [done.spacing[axis] for axis in order]
            volumes.append(HeldVolume(voxels, done.padding, spacing, done.foreground_threshold))
            subjects.append(subject_of(source))
        except BadVolume as error:
            print(f"left out    {source.path}: {error}", file=sys.stderr)
    if not volumes:
        raise ValueError(f"{data}: no volume can be used, see above")
    if labels:
        try:
            maps = number_labels(maps)
        except ValueError as error:
            raise ValueError(f"{labels}: {error} in all label maps: give those of these volumes") from None
    return volumes, maps if labels else None, subjects


def score_pooled(
    encoder: PreTrainedModel, volumes: list[HeldVolume], subjects: list[str], stride: int, arguments: argparse.Namespace
) -> dict[str, dict[str, Estimate]]:
    """What means of features tell of the subjects that `--targets` lists: row -> measure -> score."""
    listed = read_targets(arguments.targets, arguments.target, sorted(set(subjects)))
    kept = [number for number, subject in enumerate(subjects) if subject in listed]
    pooled = pool_cells(encoder, [volumes[n] for n in kept], [subjects[n] for n in kept], stride, arguments.seed)
    names, true = as_classes(listed) if arguments.classify else ((), as_numbers(listed))
    values = np.array([true[subject] for subject in sorted(listed)])
    return {row: pooled_scores(features, values, len(names)) for row, features in pooled.items()}


def draw(encoder: PreTrainedModel, volumes: list[HeldVolume], stride: int, path: Path) -> None:
    """The main components of the features of volumes, padded to one size, as colours."""
    size = [max(sizes) for sizes in zip(*(volume.shape for volume in volumes))]

    def padded(volume: HeldVolume) -> torch.Tensor:
        after = [side for have, want in zip(volume.shape[::-1], size[::-1]) for side in (0, want - have)]
        return F.pad(torch.from_numpy(volume.voxels), after, value=volume.padding)

    views = torch.stack([padded(volume) for volume in volumes])
    dense = torch.stack([dense_cells(encoder, view[None], stride) for view in views])
    place = (torch.tensor([volume.shape for volume in volumes]) - 1) / 2
    orientation = (encoder.config.preprocessing or {}).get("orientation", "RAS")
    draw_features(views, dense, place, path, planes_of(orientation))


def main(arguments: argparse.Namespace) -> None:
    if bool(arguments.targets) != bool(arguments.target):
        raise ValueError("--targets TABLE and --target COLUMN go together: name both")
    encoder = open_encoder(arguments.encoder).to(arguments.device)
    volumes, labels, subjects = read_volumes(
        arguments.data, arguments.labels, encoder.config.preprocessing or {}, arguments.volumes
    )
    stride = arguments.stride or architecture(encoder.config.model_type).feature_map(encoder.config).stride
    how = {key: getattr(arguments, key) for key in ("samples", "budgets", "draws", "test", "seed")}
    pooled = score_pooled(encoder, volumes, subjects, stride, arguments) if arguments.targets else {}
    found = evaluate_encoder(encoder, volumes, labels, stride, subjects=subjects, **how)
    print(f"{arguments.encoder}: {len(volumes)} volumes, cells of {stride} voxels\n\n{table(found)}")
    if pooled:
        print(f"\n{arguments.target}, of whole volumes\n\n{table(pooled)}")
    if arguments.output:
        facts = {"encoder": arguments.encoder, "volumes": len(volumes), "stride": stride, **how, "rows": found}
        facts |= {"pooled": pooled} if pooled else {}  # value, and the ends of its interval
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(facts, indent=2) + "\n")
    if arguments.picture:
        draw(encoder, volumes[:SHOWN], stride, arguments.picture)


if __name__ == "__main__":
    run_script(__file__, lambda: main(parse_arguments()))
