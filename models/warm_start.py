"""Start from weights that exist: our own encoders and runs, and those of others, see adaptation_plans.py."""

import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import list_repo_files, snapshot_download
from torch import nn
from transformers import PretrainedConfig

from .adaptation_plans import PLAN, read_plan
from .architectures import ARCHITECTURES, architecture, fine_tuned
from .conversion import DECODERS, Conversion, from_reference, select, unwrapped
from .weight_files import checksum, read_json, read_weights

RUN_WEIGHTS = "pretraining.safetensors"  # a run's whole composite: student, teacher, heads
ENCODER_WEIGHTS = "model.safetensors"
NNUNET_CHECKPOINT = "checkpoint_final.pth"
FILES = (RUN_WEIGHTS, ENCODER_WEIGHTS, f"{ENCODER_WEIGHTS}.index.json", f"encoder/{ENCODER_WEIGHTS}", NNUNET_CHECKPOINT)
# trainers whose Primus numbers its tokens with the first axis slowest, and with the second
XYZ_TRAINERS = ("Aligned", "ConMAE", "ConsistentViewAlignment", "Gram", "SimMIM")
YXZ_TRAINERS = ("BaseEvaMAE", "EvaMAE", "VoCoEva", "nnFoundationViT")

AXES_OF_NNUNET = "SAR"  # of a file stored as RAS, which nnU-Net, nnssl and OpenMind read as [Z, Y, X]


def load_pretrained(student: nn.Module, source: str, token_order: str | None = None) -> str:
    """Load an encoder, and what fits of a decoder if there is one, into a student of pretraining or of fine-tuning.

    Args:
        source: a `.pth` or `.safetensors` file, a folder (an encoder, a bundle, a run), or the Hub id of one.
        token_order: "xyz" or "yxz" (see `from_reference`) for a foreign Primus that does not tell.

    Returns:
        What was loaded, changed and left, as text of a few lines.

    Raises:
        ValueError: if the source cannot be read safely, is a fine-tuned model, or lacks a tensor of the encoder.
    """
    path = find(source)
    weights, content = read_weights(path)
    encoder = student.features.encoder
    wanted = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    wanted |= {name: tensor.shape for name, tensor in student.state_dict().items() if name.startswith(DECODERS)}
    about = _about(path, content)
    try:
        found = _convert(weights, about, wanted, encoder.config, token_order)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    encoder.load_state_dict({name: w for name, w in found.weights.items() if not name.startswith(DECODERS)})
    rest = {name: w for name, w in found.weights.items() if name.startswith(DECODERS)}
    student.load_state_dict(rest, strict=False)
    foreign = under_our_names(weights, architecture(encoder.config.model_type).input_weights[0]) is None
    _warn_of_other_axes(source, about["orientation"] or (AXES_OF_NNUNET if foreign else None), encoder.config)
    return report(path, found, rest.keys(), wanted.keys())


def _warn_of_other_axes(source: str, theirs: str | None, config: PretrainedConfig) -> None:
    ours = (config.preprocessing or {}).get("orientation")
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"{source} saw volumes along the axes {theirs}, this encoder sees them along {ours}: set data.orientation="
            f"{theirs}, or its filters start out turned",
            stacklevel=3,
        )


def _convert(
    weights: dict[str, torch.Tensor],
    about: dict,
    wanted: dict[str, torch.Size],
    config: PretrainedConfig,
    token_order: str | None,
) -> Conversion:
    weights = {name.replace("_orig_mod.", ""): w for name, w in weights.items()}  # torch.compile's mark
    row, told = architecture(config.model_type), about.get("model_type", config.model_type)
    if told != config.model_type and told in ARCHITECTURES:
        raise ValueError(f"it is a {told}, our encoder is a {config.model_type}")
    if about["fine_tuned"]:
        raise ValueError(f"it is a {about['fine_tuned']}: give the encoder that it was fine-tuned from")
    ours = under_our_names(weights, row.input_weights[0])
    has_tokens = row.nnunet is not None and row.nnunet.from_yxz is not None
    if ours is not None:
        names = {name: [name, f"patch_{name}"] for name in wanted}  # pretraining has decoder and patch_decoder
        found = select(ours, names, wanted, config, about["image_size"])
    else:
        stem = about["key_to_stem"]
        unwrapped(weights, config.model_type, stem)  # before a question about something that is not there
        order = (token_order or about["token_order"] or token_order_of(about["trainer_name"])) if has_tokens else "xyz"
        found = from_reference(weights, wanted, config, order, about["image_size"], stem)
    if token_order and (ours is not None or not has_tokens):
        found.changed.append("nothing for --init-token-order: the order of these tokens is known")
    return found


def under_our_names(weights: dict[str, torch.Tensor], input_weight: str) -> dict[str, torch.Tensor] | None:
    """The weights under the names that our encoder and student use, if they are ours."""
    anchors = [name for name in weights if f".{name}".endswith(f".{input_weight}") and "teacher." not in name]
    if not anchors:
        return None
    prefix = min(anchors, key=len).removesuffix(input_weight)
    student = prefix.removesuffix("features.encoder.")  # of a whole student the decoders are wanted too
    return {n.removeprefix(prefix).removeprefix(student): w for n, w in weights.items() if "teacher." not in n}


def token_order_of(trainer: str) -> str:
    """How a trainer of nnssl numbers the tokens of a Primus; ValueError if that is not known of it."""
    if trainer.startswith(XYZ_TRAINERS):
        return "xyz"
    if trainer.startswith(YXZ_TRAINERS):
        return "yxz"
    raise ValueError(
        f"its trainer {trainer or '(none named)'} does not tell in which order it numbers tokens; a wrong order trains "
        "on without an error, so say it: --init-token-order yxz for nnssl's masked autoencoders (EvaMAE), xyz for its "
        "SimMIM, for CVA's own and for networks of nnU-Net"
    )


def find(source: str) -> Path:
    """The file to read: as given, in the folder given, or downloaded from the Hub (safetensors before `.pth`).

    Args:
        source: a path, `ORG/NAME`, or `ORG/NAME@REVISION` with a branch, tag or commit.

    Raises:
        ValueError: if there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    path = path if path.is_dir() else _from_hub(source)
    name = next((file for file in FILES if (path / file).is_file()), None)
    if name is None:
        raise ValueError(f"{source}: holds neither {RUN_WEIGHTS}, {ENCODER_WEIGHTS} nor {NNUNET_CHECKPOINT}")
    return path / name


def origin(source: str, file: Path) -> str:
    """What may be published of where weights came from: no path of this machine.

    Args:
        source: as it was given.
        file: what `find` found for it.

    Returns:
        `ORG/NAME@COMMIT` for a Hub id, else name and checksum.
    """
    path = Path(source)
    if not path.exists():
        snapshot = next(folder for folder in file.parents if folder.parent.name == "snapshots")
        return f"{source.partition('@')[0]}@{snapshot.name}"
    name = file.name if path.is_file() else f"{path.resolve().name}/{file.relative_to(path)}"
    return f"{name} (sha256 {checksum(file)})"


def _from_hub(source: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) or source.startswith("."):
        raise ValueError(f"{source}: no such file or folder, and not a Hub id (ORG/NAME or ORG/NAME@REVISION)")
    name, _, revision = source.partition("@")
    repo = {"repo_id": name, "revision": revision or None}
    try:
        present = list_repo_files(**repo)
        name = next((file for file in FILES if file in present), None)
        wanted = ["config.json", PLAN, name, "model-*.safetensors"] if name else ["config.json"]
        return Path(snapshot_download(**repo, allow_patterns=wanted))
    except Exception as error:  # the network's errors differ from one client to the next
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        path = Path(snapshot_download(**repo, local_files_only=True))
    except OSError:  # nothing of it in the cache
        raise ValueError(f"{source}: no such file or folder, and not to be had from the Hub ({reason})") from None
    warnings.warn(f"{source}: the Hub did not give it ({reason}); this is the copy downloaded before", stacklevel=2)
    return path


def _about(path: Path, content: dict) -> dict:
    """What a checkpoint, and plan or configuration beside it, say: trainer, order of tokens, crop, model type."""
    plan = read_plan(path, content)
    about = {"trainer_name": plan.trainer, "key_to_stem": plan.key_to_stem, "orientation": None, "fine_tuned": None}
    about["token_order"] = plan.token_order
    sizes = [*plan.crops]
    if file := configuration_of(path):
        known = read_json(file)
        orientation = _dict(known.get("preprocessing")).get("orientation")
        about["orientation"] = orientation if isinstance(orientation, str) else None
        model = fine_tuned(known)
        about["fine_tuned"] = model and model.__name__
        if not content:
            size = known.get("image_size")
            valid = isinstance(size, list) and [type(n) for n in size] == [int] * 3
            sizes += [size] if valid else []
            if isinstance(known.get("model_type"), str):
                about["model_type"] = known["model_type"]
    return about | {"image_size": sizes[0] if sizes else None}


def configuration_of(file: Path) -> Path | None:
    """The config.json of ours that tells of a file of weights; beside a `.pth` of others lies one that says nothing."""
    places = (file.parent / "encoder" / "config.json", file.parent / "config.json")  # the former: in a run
    for place in places:
        if place.is_file() and (file.suffix != ".pth" or read_json(place).get("model_type") in [*ARCHITECTURES]):
            return place
    return None


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def report(path: Path, found: Conversion, decoders: set[str], wanted: set[str]) -> str:
    """What was loaded from a file, changed and left, as text of a few lines."""
    count = sum(w.numel() for w in found.weights.values()) / 1e6
    of_decoder = f", {len(decoders)} of them the decoder's" if decoders else ", no decoder"
    lines = [f"{path}: {len(found.weights)} tensors, {count:.1f} M parameters{of_decoder}"]
    lines += [f"changed: {change}" for change in dict.fromkeys(found.changed)]
    fresh = Counter(name.split(".")[0] for name in wanted - found.weights.keys())
    lines += [f"fresh: {count} of {part}" for part, count in fresh.items()]
    left = Counter((name.split(".")[0], reason) for name, reason in found.left.items())
    lines += [f"left: {count} of {part}, {reason}" for (part, reason), count in left.items()]
    return "\n            ".join(lines)
