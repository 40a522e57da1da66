"""What a fine-tuning takes over from its encoder and from its labelled data, as numbers of its recipe."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from data.labels import Classes, classes_of, find_dataset, labelled_rows, read_classes
from data.manifest import FOR_RUNS, LABELS, read_manifest
from models import architecture
from models.architectures import fine_tuned
from models.warm_start import configuration_of, find
from models.weight_files import read_json
from training.preparation import is_prepared
from training.run_folder import RunFolder

OF_DATA = ("orientation", "spacing", "intensity", "intensity_of_ct", "channels")
OF_VIEWS = ("crop_size", "coarsest_last")


def take_over(arguments: argparse.Namespace) -> list[str]:
    """The numbers of `--encoder`, see below; sets `init_from`, the weights to start from, None with `--from-scratch`.

    Raises:
        ValueError: if there is neither.
    """
    if not (arguments.encoder or arguments.from_scratch):
        raise ValueError("name --encoder PATH_OR_HUB_ID, or train --from-scratch")
    arguments.init_from = None if arguments.from_scratch else arguments.encoder
    return numbers_of_encoder(arguments.encoder) if arguments.encoder else []


def numbers_of_encoder(source: str) -> list[str]:
    """Overrides of a recipe, `key.subkey=value`: how volumes are prepared, the network's sizes, its crop.

    Args:
        source: a folder or a Hub id, as for `models.warm_start.find`; a checkpoint of nnssl has no configuration of
            ours, and gives nothing: the recipe must fit it.

    Raises:
        ValueError: if there is none, or it is no encoder of this project.
    """
    if RunFolder(Path(source)).model.is_dir():
        raise ValueError(f"{source}: it is a run that fine-tunes: give the encoder that it was fine-tuned from")
    path = configuration_of(find(source))
    if path is None:
        return []
    numbers = read_json(path)
    if model := fine_tuned(numbers):
        raise ValueError(f"{source}: it is a {model.__name__}: give the encoder that it was fine-tuned from")
    row, known = architecture(numbers.get("model_type")), numbers.get("preprocessing") or {}
    if not {*OF_DATA[:2], "crop_size"} <= known.keys():
        raise ValueError(f"{path} does not say how volumes are prepared; add `preprocessing` to it")
    taken = {"model": row.section.of_encoder(row.config.from_dict(numbers))}
    taken |= {f"data.{key}": known[key] for key in OF_DATA if key in known}
    taken |= {f"views.{key}": known[key] for key in OF_VIEWS if key in known}
    return [_override(key, value) for key, value in taken.items()]


def numbers_of_labels(data: Path, labels: Path | None) -> list[str]:
    """The same, of the classes: those of a prepared folder, or of the `dataset.json` beside volumes or label maps.

    Raises:
        ValueError: if nothing tells them.
    """
    classes = _classes(data, labels)
    return [_override("data.classes", dict(zip(classes.names, classes.values)))]


def _classes(data: Path, labels: Path | None) -> Classes:
    if is_prepared(data):
        manifest = read_manifest(data, (*FOR_RUNS, *LABELS))
        return classes_of(manifest, labelled_rows(manifest))
    if not data.exists():
        raise ValueError(f"--data {data}: no such folder or file")
    if labels is None:
        raise ValueError(
            f"--data {data}: it has neither imagesTr and labelsTr nor images and labels: name --labels FOLDER"
        )
    if dataset := find_dataset(data, labels):
        return read_classes(dataset)
    raise ValueError(
        f"--data {data} has no dataset.json that names its classes: name them yourself, such as "
        "'data.classes={background: 0, liver: 1}'"
    )


def _override(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"
