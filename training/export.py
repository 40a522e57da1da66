"""Write an encoder so that anyone can load it: weights, code, preprocessing and model card in one folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from data.image_processing_volume import VolumeImageProcessor
from models.warm_start import ENCODER_WEIGHTS, RUN_WEIGHTS

from .model_card import LOSSES, model_card

LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"  # of the code that goes with the weights
FACTS = "pretraining.json"  # what is known of the run that made the weights


def preprocessing(orientation: str, spacing: tuple[float, ...], crop_size: tuple[int, ...]) -> dict:
    """What must be done to a volume before the encoder sees it, in this order; goes into config.json."""
    return {
        "orientation": orientation,
        "crop_to_nonzero_box": True,
        "normalisation": "z-score over that box",
        "spacing": list(spacing),
        "interpolation": "cubic; nearest along an axis more than 3 times coarser than the finest",
        "crop_size": list(crop_size),
        "padding_value": 0.0,
    }


def processor(config: PretrainedConfig) -> VolumeImageProcessor:
    """The object that does what `config.preprocessing` says."""
    return VolumeImageProcessor(**{key: config.preprocessing[key] for key in ("orientation", "spacing", "crop_size")})


def write_encoder(encoder: PreTrainedModel, facts: dict, card: str, folder: Path) -> None:
    """Fill a folder that `AutoModel` and `AutoImageProcessor` read with `trust_remote_code=True`.

    Args:
        facts: what is known of the pretraining; see `model_card`.
        card: text of the model card.
    """
    type(encoder.config).register_for_auto_class()
    type(encoder).register_for_auto_class("AutoModel")
    VolumeImageProcessor.register_for_auto_class("AutoImageProcessor")
    logging.disable_progress_bar()
    encoder.save_pretrained(folder)
    logging.enable_progress_bar()
    processor(encoder.config).save_pretrained(folder)
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    (folder / ENCODER_WEIGHTS).chmod((folder / FACTS).stat().st_mode)  # safetensors lets nobody else read it
    ModelCard(card).save(folder / "README.md")
    shutil.copy(LICENSE, folder)


def write_run(
    encoder: PreTrainedModel, weights: dict[str, torch.Tensor], facts: dict, records: list[dict], output: Path
) -> None:
    """Write what a run gives away: `encoder/`, and all its weights for `publish.py` and for warm starts.

    Args:
        encoder: the run's own; its parameters may be sharded.
        weights: the composite's full state dict, as gathered.
        facts: of the run; see `model_card`.
        records: of `metrics.jsonl`.
    """
    steps = [0, *(record["step"] for record in records)]
    seconds = sum((record["step"] - before) * record["seconds"] for before, record in zip(steps, records))
    last = next((record for record in reversed(records) if "loss" in record), {})
    losses = {key: last[key] for key in LOSSES if key in last}
    facts = {**facts, "hours": seconds / 3600, "losses": losses, "weights": "student"}

    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    prefix = "student.features.encoder."
    with torch.random.fork_rng(devices=[]):  # the run's random numbers must not depend on when it exports
        student = type(encoder)(encoder.config)
    student.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    card = model_card(student, facts, str(output / "encoder"))
    temporary = output / f".{RUN_WEIGHTS}"
    try:
        save_file(weights, temporary, metadata={"step": str(facts["step"])})
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{output / RUN_WEIGHTS} could not be written ({error}); --resume auto writes it again"
        ) from error
    temporary.chmod((output / "recipe.yaml").stat().st_mode)  # safetensors lets nobody else read it
    temporary.replace(output / RUN_WEIGHTS)
    replace_folder(output / "encoder", lambda folder: write_encoder(student, facts, card, folder))


def read_run_weights(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """All weights of a run - student, teacher, heads - and their step.

    Raises:
        ValueError: if it is not there or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, int((file.metadata() or {}).get("step", -1))  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): --resume auto writes it again, or publish encoder/ alone"
        ) from None


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder beside this one, then put it in this one's place: whole, or not at all.

    Raises:
        OSError: if it cannot be written; what stood there stays.
    """
    folder = folder.resolve()  # not the link, what it points to
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            write(new)
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except OSError:
                if old.exists():
                    old.rename(folder)
                raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder} could not be written ({error}); what was there is untouched") from error
