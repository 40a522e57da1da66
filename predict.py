"""Let a fine-tuned model segment NIfTI volumes, or answer for whole ones.

    python predict.py runs/segmentation/model FOLDER_OR_FILES --output masks

Masks are in the space, orientation and spacing of each file; a model of finetune_volumes.py writes OUTPUT/answers.csv.

MODEL is an OUTPUT of a fine-tuning, its model/, or a Hub id. Of a folder all volumes below it are taken (label maps and
the like are left out by their names, as prepare_data.py does), and their paths are kept; a model of several channels
finds those of a case by the layout of the folder (BIDS, nnU-Net's _0000 and _0001). What is there already is not done
again; a file that cannot be used is named and the others go on, with exit code 1 at the end.

`--labels FOLDER` also scores the masks against label maps of the same names, into OUTPUT/scores.json.
"""

import training.shared_cpu  # noqa: F401

# isort: split
import argparse
import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from data.channels import group_channels
from data.files import write_whole
from data.labels import Classes
from data.normalisation import BadVolume
from data.placement import Placed, to_source_grid
from data.sources import Listing, Source, find_sources, is_nifti, with_labels
from evaluation.answers import append_row, rows_done
from evaluation.cases import Scored, write_scores
from evaluation.inference import answer_of_volume, class_probabilities
from evaluation.scores import segmentation_scores
from models import ImageClassificationModel, load_fine_tuned
from models.modeling_classification import CLASSIFICATION
from models.warm_start import find
from models.weight_files import read_json
from training.command_line import DISK_ERRORS, run
from training.export import OF_FINE_TUNING, processor
from training.run_folder import RunFolder

Writer = tuple[Callable[[Source], bool], Callable[[Source, list[Path]], None]]  # is a case done, and what does it


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, or ORG/NAME[@REVISION] of the Hub")
    add("inputs", nargs="+", type=Path, metavar="FOLDER_OR_FILES", help="one folder, or NIfTI files")
    add("--output", type=Path, required=True, help="folder of the masks or answers")
    add("--probabilities", action="store_true", help="write the probability of each class, too, as NAME_probabilities")
    add("--labels", type=Path, help="folder of true label maps, to score the masks")
    add("--overlap", type=float, help="share of a window that the next one repeats (default: as in its fine-tuning)")
    mirror = "average over the 8 mirrored copies (default: as in its fine-tuning)"
    add("--mirror", action=argparse.BooleanOptionalAction, help=mirror)
    add("--windows", type=int, default=1, help="at once")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------- what is predicted


def find_cases(inputs: list[Path], channels: list[str]) -> tuple[Path, list[tuple[Source, ...]]]:
    """The folder that paths start at, and what is predicted together: a volume, or the channels of a case.

    Raises:
        ValueError: if there is nothing.
    """
    if len(inputs) == 1 and not inputs[0].is_file():
        listing = find_sources(inputs[0])
    else:
        if wrong := [path for path in inputs if not (path.is_file() and is_nifti(path.name))]:
            raise ValueError(f"{wrong[0]}: no such .nii or .nii.gz file; give one folder, or files")
        if channels:
            raise ValueError(f"this model reads {', '.join(channels)} together: give the folder that holds them")
        paths = [path.absolute() for path in inputs]
        root = Path(os.path.commonpath([path.parent for path in paths]))
        listing = Listing(root, [Source(path.relative_to(root).as_posix()) for path in sorted(set(paths))], [])
    groups, left_out = group_channels(listing.sources, channels)
    for path, reason in left_out:
        print(f"left out    {path}: {reason}")
    return listing.root, groups


def mask_of(source: Source, folder: Path) -> Path:
    stem = source.path.removesuffix(".gz").removesuffix(".nii")
    return folder / f"{stem}.nii.gz"


def predict_case(
    model: PreTrainedModel, images: list[Path], overlap: float, mirror: bool, windows: int
) -> tuple[torch.Tensor, Placed]:
    """Probabilities of the classes on the grid of the file, `[K, *shape]`, and where they were computed.

    Args:
        images: a file, or one for each of the model's channels.

    Raises:
        BadVolume, OSError: if a file cannot be used.
    """
    placed = place(model, images)
    volume, crop_size = torch.from_numpy(placed.voxels).to(model.device), processor(model.config).crop_size
    found = class_probabilities(model, volume, placed.padding, crop_size, overlap, mirror, windows)
    return to_source_grid(found.cpu(), placed), placed


def place(model: PreTrainedModel, images: list[Path]) -> Placed:
    """A file, or one for each of the model's channels, prepared.

    Raises:
        BadVolume, OSError: if a file cannot be used.
    """
    prepare = processor(model.config)
    return prepare.place(dict(zip(prepare.channels, images)) if prepare.channels else images[0])


def save_image(voxels: np.ndarray, like: Path, file: Path) -> None:
    """With the place, orientation and spacing of `like`, whole or not at all."""
    header = nib.load(like).header.copy()
    header.set_data_dtype(voxels.dtype)
    header.set_slope_inter(1, 0)
    image = nib.Nifti1Image(voxels, None, header)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda temporary: temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=3)))


def mask_writer(model: PreTrainedModel, facts: dict, arguments: argparse.Namespace, how: dict) -> Writer:
    values = np.array(list(facts["classes"].values()))
    values = values.astype(np.min_scalar_type(int(values.max())))

    def write(source: Source, images: list[Path]) -> None:
        file, (found, _) = mask_of(source, arguments.output), predict_case(model, images, **how)
        if arguments.probabilities:
            stem = file.name.removesuffix(".nii.gz")
            save_image(found.movedim(0, -1).numpy(), images[0], file.with_name(f"{stem}_probabilities.nii.gz"))
        save_image(values[found.argmax(dim=0).numpy()], images[0], file)  # last: it is the mark that the case is done

    return lambda source: mask_of(source, arguments.output).exists(), write


def answer_writer(model: PreTrainedModel, facts: dict, arguments: argparse.Namespace, how: dict) -> Writer:
    """Into a table: a class and the probability of each, or the number."""
    if arguments.labels or arguments.probabilities:
        raise ValueError(f"--labels and --probabilities are for models that segment; {arguments.model} does not")
    names, classifies = [*model.config.id2label.values()], model.config.problem_type == CLASSIFICATION
    columns = ["path", "class", *(f"probability of {name}" for name in names)] if classifies else ["path", *names]
    file, crop_size = arguments.output / "answers.csv", processor(model.config).crop_size
    done = rows_done(file, columns)
    if done:
        print(f"goes on     after the {len(done)} lines of {file}; for another model, choose another --output")

    def write(source: Source, images: list[Path]) -> None:
        placed = place(model, images)
        volume = torch.from_numpy(placed.voxels).to(model.device)
        answer = answer_of_volume(model, volume, placed.padding, crop_size, **how).tolist()
        append_row(file, [source.path, *([names[int(np.argmax(answer))]] if classifies else []), *answer])

    return lambda source: source.path in done, write


# --------------------------------------------------------------------------- the model, and how good it is


def load_model(source: str) -> tuple[PreTrainedModel, dict]:
    """A fine-tuned model, and what is known of its training.

    Raises:
        ValueError: if it is none.
    """
    place = RunFolder(Path(source))
    if place.encoder.is_dir():
        raise ValueError(f"{source}: it is a run that pretrains, fine-tune what it made with finetune.py")
    folder = place.model if place.model.is_dir() else find(source).parent
    model = load_fine_tuned(folder)
    if not (folder / OF_FINE_TUNING).is_file():
        raise ValueError(
            f"{source}: {OF_FINE_TUNING} is missing, which says what its classes are: fine-tune with finetune.py"
        )
    return model, read_json(folder / OF_FINE_TUNING)


def score(folder: Path, labels: Path, cases: list[Source], facts: dict, tolerance: float) -> None:
    """Score masks against label maps of the same names, in the space of the files, into `scores.json`."""
    names, values = zip(*facts["classes"].items())
    lookup, scored = Classes(names, values).lookup(), []
    for source in with_labels(cases, labels):
        mask = mask_of(source, folder)
        if not source.label or not mask.exists():
            continue
        true, found = nib.load(labels / source.label), nib.load(mask)
        if true.shape[:3] != found.shape or not np.allclose(true.affine, found.affine, atol=1e-2):
            print(f"not scored  {source.path}: its label map is on another grid")
            continue
        voxels = (np.asarray(one.dataobj).reshape(found.shape).astype(np.int64) for one in (found, true))
        masks = [torch.from_numpy(one) for one in voxels]
        if unknown := sorted(set(masks[1].unique().tolist()) - set(values)):
            print(f"not scored  {source.path}: its label map has {unknown[0]}, which is no class of the model")
            continue
        spacing = nib.affines.voxel_sizes(found.affine).tolist()
        scores = segmentation_scores(*(lookup[mask] for mask in masks), len(names), spacing, tolerance)
        scored.append(Scored(source.path, "labelled", {key: value.tolist() for key, value in scores.items()}))
    if not scored:
        raise ValueError(f"--labels {labels}: no file there has the name of a volume that was predicted")
    write_scores(scored, names[1:], tolerance, folder / "scores.json")


def main(arguments: argparse.Namespace) -> None:
    model, facts = load_model(arguments.model)
    model, inference = model.to(arguments.device).eval(), facts["recipe"]["inference"]
    asked = {"overlap": arguments.overlap, "mirror": arguments.mirror}
    how = {key: inference[key] if value is None else value for key, value in asked.items()}
    how |= {"windows": arguments.windows}
    root, cases = find_cases(arguments.inputs, processor(model.config).channels)
    arguments.output.mkdir(parents=True, exist_ok=True)
    kind = answer_writer if isinstance(model, ImageClassificationModel) else mask_writer
    is_done, write = kind(model, facts, arguments, how)
    bad = 0
    for case in tqdm(cases, desc="predicting", unit="case"):
        if is_done(case[0]):
            continue
        try:
            write(case[0], [root / one.path for one in case])
        except (BadVolume, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            bad += 1
            tqdm.write(f"left out    {case[0].path}: {error}")
    print(f"predicted   {len(cases) - bad} of {len(cases)} in {arguments.output}")
    if arguments.labels:
        score(arguments.output, arguments.labels, [case[0] for case in cases], facts, inference["tolerance"])
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    run(__file__, lambda: main(parse_arguments()))
