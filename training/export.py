"""What a run gives away: an encoder that anyone can load, with its code and model card; all weights; pictures."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from data.files import write_whole
from data.image_processing_volume import VolumeImageProcessor
from models.warm_start import ENCODER_WEIGHTS

from .facts import RunFacts
from .metrics import read_metrics
from .model_card import model_card
from .report import Draw, draw_report, first_sample
from .run import Run
from .run_folder import RunFolder

LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"  # of the code that goes with the weights
FACTS = "pretraining.json"  # what is known of the run that made the weights
OF_FINE_TUNING = "finetuning.json"  # the same, of one that fine-tuned them
FOR_SEGMENTATION = "AutoModelForSemanticSegmentation"
FOR_WHOLE_VOLUMES = "AutoModelForImageClassification"


def processor(config: PretrainedConfig) -> VolumeImageProcessor:
    """The object that does what `config.preprocessing` says."""
    known = ("orientation", "spacing", "crop_size", "intensity", "intensity_of_ct", "channels", "coarsest_last")
    there = {key: config.preprocessing[key] for key in known if key in config.preprocessing}  # an older one has fewer
    return VolumeImageProcessor(**there)


def for_use(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without what regularises pretraining alone: whoever fine-tunes chooses that anew."""
    config = copy.deepcopy(config)
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = 0.0
    return config


def write_encoder(encoder: PreTrainedModel, facts: dict, card: str, folder: Path) -> None:
    """See `write_model`; for `AutoModel`."""
    write_model(encoder, "AutoModel", FACTS, facts, card, folder)


def write_model(model: PreTrainedModel, auto: str, file: str, facts: dict, card: str, folder: Path) -> None:
    """Fill a folder that transformers reads with `trust_remote_code=True`.

    Args:
        auto: its class for such models; `AutoImageProcessor` is for what prepares volumes.
        file: where the facts go, what is known of the training; see `model_card`.
        card: text of the model card.
    """
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class(auto)
    VolumeImageProcessor.register_for_auto_class("AutoImageProcessor")
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    processor(model.config).save_pretrained(folder)
    (folder / file).write_text(json.dumps(facts, indent=1))
    (folder / ENCODER_WEIGHTS).chmod((folder / file).stat().st_mode)  # safetensors lets nobody else read it
    ModelCard(card).save(folder / "README.md")
    shutil.copy(LICENSE, folder)


def gather_weights(run: Run) -> dict[str, torch.Tensor] | None:
    """The composite's full state dict on the CPU of the main rank, None on the others; all ranks make the call."""
    weights = run.accelerator.get_state_dict(run.wrapped)
    if not run.is_main:
        return None
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def export_run(
    run: Run,
    step: int,
    batch: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    draw: Draw | None = None,
) -> None:
    """Write encoder folder, all weights and pictures where they are due; all ranks take part in gathering weights.

    The main rank writes in a thread while training goes on: nothing there may draw random numbers.

    Args:
        step: steps done.
        batch: of `run.held_out()`, as the model was called with it.
        outputs: of `run.look(batch)`.
        draw: the method's own pictures into `report/`, given that folder and the planes (`planes_of`); what it draws
            is on the CPU.
    """
    if not run.export_is_due:
        return
    if (weights := gather_weights(run)) is None:
        return
    encoder = run.model.student.features.encoder
    with torch.random.fork_rng(devices=[]):  # the run's random numbers must not depend on when it exports
        student = type(encoder)(for_use(encoder.config))
    sample, facts, terms, folder = first_sample(batch, outputs), run.facts, list(run.model.terms), run.folder

    def write() -> None:
        write_run(student, weights, facts, terms, step, folder)
        try:
            draw_report(folder, sample, student, facts, step, draw)
        except Exception as error:  # no picture is worth a run
            warnings.warn(f"report/ could not be drawn: {type(error).__name__}: {error}", stacklevel=2)
        if run.evaluates(step):
            try:
                run.evaluation.start(step, last=step == run.recipe.train.steps)
            except OSError as error:
                warnings.warn(f"the encoder of step {step} is not judged: {error}", stacklevel=2)

    run.background.start(write)


def write_run(
    student: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    facts: RunFacts,
    terms: list[str],
    step: int,
    folder: RunFolder,
) -> None:
    """Write what a run gives away: `encoder/`, and all its weights for `publish.py` and for warm starts.

    Args:
        student: an encoder like the run's, to be filled with its weights.
        weights: the composite's full state dict, on the CPU.
        terms: those that are trained.
    """
    records = [record for record in read_metrics(folder.metrics) if "seconds" in record and record["step"] <= step]
    steps = [0, *(record["step"] for record in records)]
    seconds = sum((record["step"] - before) * record["seconds"] for before, record in zip(steps, records))
    last = next((record for record in reversed(records) if "loss" in record), {})
    known = {
        **{key: value for key, value in asdict(facts).items() if key != "init_from"},  # a path of this machine
        "step": step,
        "hours": seconds / 3600,
        "losses": {key: last[key] for key in terms if key in last},
        "network": "student",
    }
    prefix = "student.features.encoder."
    student.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    card = model_card(student, known, str(folder.encoder))

    def save(file: Path) -> None:
        save_file(weights, file, metadata={"step": str(step)})
        file.chmod(folder.recipe.stat().st_mode)  # safetensors lets nobody else read it

    try:
        write_whole(folder.weights, save)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder.weights} could not be written ({error}); --resume auto writes it again") from error
    replace_folder(folder.encoder, lambda place: write_encoder(student, known, card, place))


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
