"""Start from weights that exist: our own encoders and runs, nnssl / OpenMind checkpoints, nnU-Net's format."""

import json
import pickle
import re
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .conversion import DECODERS, Conversion, from_reference, select

RUN_WEIGHTS = "pretraining.safetensors"  # a run's whole composite: student, teacher, heads
ENCODER_WEIGHTS = "model.safetensors"
NNUNET_CHECKPOINT = "checkpoint_final.pth"
OURS = ("patch_embed.weight", "stem.conv.weight")  # one of these is in every encoder of ours
XYZ_TRAINERS = ("Aligned", "Con", "Gram", "Consistent")  # CVA's published trainers, and ours
YXZ_TRAINERS = ("BaseEvaMAE", "EvaMAE")  # nnssl's masked autoencoders


def load_pretrained(student: nn.Module, source: str, token_order: str | None = None) -> str:
    """Load an encoder, and the pretraining decoder if there is one, into a `MaskedPrimus` or `MaskedResEnc`.

    Args:
        source: a `.pth` or `.safetensors` file, a folder (an encoder, a bundle, a run), or the Hub id of one.
        token_order: "xyz" or "yxz" (see `from_reference`) for a foreign Primus that does not tell.

    Returns:
        What was loaded, changed and left, as text of a few lines.

    Raises:
        ValueError: if the source cannot be read safely, or a tensor of the encoder would not be loaded.
    """
    path = find(source)
    weights, about = read_weights(path)
    encoder = student.features.encoder
    wanted = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    wanted |= {name: tensor.shape for name, tensor in student.state_dict().items() if name.startswith(DECODERS)}
    try:
        found = _convert(weights, about, wanted, encoder.config, token_order)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    encoder.load_state_dict({name: w for name, w in found.weights.items() if not name.startswith(DECODERS)})
    rest = {name: w for name, w in found.weights.items() if name.startswith(DECODERS)}
    student.load_state_dict(rest, strict=False)
    return _report(path, found, rest.keys(), wanted.keys())


def _convert(weights, about, wanted, config, token_order) -> Conversion:
    weights = {name.removeprefix("student."): w for name, w in weights.items() if not name.startswith("teacher.")}
    weights = {name.removeprefix("features.encoder."): w for name, w in weights.items()}
    image_size = about.get("image_size")
    if any(name in weights for name in OURS):
        if about.get("model_type", config.model_type) != config.model_type:
            raise ValueError(f"it is a {about['model_type']}, the recipe's encoder is a {config.model_type}")
        return select(weights, {name: [name] for name in wanted}, wanted, config, image_size)
    if config.model_type == "primus" and token_order is None:
        token_order = _token_order(about.get("trainer_name") or "")
    return from_reference(weights, wanted, config, token_order or "xyz", image_size)


def _token_order(trainer: str) -> str:
    if trainer.startswith(XYZ_TRAINERS):
        return "xyz"
    if trainer.startswith(YXZ_TRAINERS):
        return "yxz"
    raise ValueError(
        f"its trainer {trainer or '(none named)'} does not tell in which order it numbers tokens; a wrong order trains "
        "on without an error, so say it: --init-token-order yxz for nnssl's own Primus pretraining, xyz for CVA's and "
        "for networks of nnU-Net"
    )


def find(source: str) -> Path:
    """The file to read: as given, in the folder given, or downloaded from the Hub (safetensors before `.pth`).

    Raises:
        ValueError: if there is none.
    """
    path = Path(source)
    if path.is_file():
        return path
    files = [RUN_WEIGHTS, ENCODER_WEIGHTS, f"{ENCODER_WEIGHTS}.index.json", NNUNET_CHECKPOINT]
    if not path.is_dir():
        try:
            present = list_repo_files(source)
            name = next((f for f in files if f in present), None)
            wanted = ["config.json", name, "model-*.safetensors"] if name else ["config.json"]
            path = Path(snapshot_download(source, allow_patterns=wanted))
        except HFValidationError:
            raise ValueError(f"{source}: no such file or folder, and not a Hub id (ORG/NAME)") from None
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{source}: no such file or folder, and not to be had from the Hub ({reason})") from None
    name = next((f for f in files if (path / f).is_file()), None)
    if name is None:
        raise ValueError(f"{source}: holds neither {', '.join(files[:2])} nor {NNUNET_CHECKPOINT}")
    return path / name


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a file, and what it says of itself: `trainer_name`, `image_size`, `model_type`, if known.

    A pickle is read with `weights_only=True`: tensors and plain values, never code.

    Raises:
        ValueError: if the file is damaged or holds anything else.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path), _config_beside(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds more than tensors and plain values ({culprit[1]})" if culprit else "is damaged or holds objects"
        raise ValueError(
            f"{path} {what}: loading it could run code, so it is refused; ask its author for a .safetensors file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    weights = next((content[k] for k in ("network_weights", "state_dict", "model") if k in content), content)
    weights = {name: w for name, w in weights.items() if isinstance(w, torch.Tensor)}
    about = {"trainer_name": content.get("trainer_name")}
    plan = content.get("nnssl_adaptation_plan") or {}
    for configuration in ((plan.get("pretrain_plan") or {}).get("configurations") or {}).values():
        about["image_size"] = configuration.get("patch_size")
    return weights, about


def _read_shards(index: Path) -> tuple[dict[str, torch.Tensor], dict]:
    names = set(json.loads(index.read_text())["weight_map"].values())
    for name in names:
        if Path(name).name != name:  # an index could name any file of this machine
            raise ValueError(f"{index} names {name}, which is not a file beside it: refused")
    weights = {}
    for name in sorted(names):
        weights |= read_weights(index.parent / name)[0]
    return weights, _config_beside(index)


def _config_beside(path: Path) -> dict:
    beside = (path.parent / "config.json", path.parent / "encoder" / "config.json")  # the latter: in a run
    config = next((file for file in beside if file.is_file()), None)
    if config is None:
        return {}
    try:
        known = json.loads(config.read_text())
    except json.JSONDecodeError:
        raise ValueError(f"{config} is damaged") from None
    return {key: known.get(key) for key in ("model_type", "image_size") if known.get(key)}


def _report(path: Path, found: Conversion, decoders: set[str], wanted: set[str]) -> str:
    count = sum(w.numel() for w in found.weights.values()) / 1e6
    of_decoder = f", {len(decoders)} of them the decoder's" if decoders else ", no decoder"
    lines = [f"{path}: {len(found.weights)} tensors, {count:.1f} M parameters{of_decoder}"]
    lines += [f"changed: {change}" for change in dict.fromkeys(found.changed)]
    fresh = Counter(name.split(".")[0] for name in wanted - found.weights.keys())
    lines += [f"fresh: {count} of {part}" for part, count in fresh.items()]
    left = Counter((name.split(".")[0], reason) for name, reason in found.left.items())
    lines += [f"left: {count} of {part}, {reason}" for (part, reason), count in left.items()]
    return "\n            ".join(lines)
