"""Reading files that someone else wrote: tensors and plain values, never code; one line for whatever is wrong."""

import hashlib
import json
import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file


def checksum(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: if it is not there, damaged, or not an object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "damaged"
        raise ValueError(f"{path}: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: damaged, it holds no object")
    return content


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors of a checkpoint (`.safetensors`, its index, or `.pth`), and whatever else a `.pth` holds.

    A pickle is read with `weights_only=True`: a file with code in it is refused and not run.

    Raises:
        ValueError: if the file is not there, damaged, holds anything but tensors and plain values, or weights that are
            not finite.
    """
    if path.name.endswith(".index.json"):
        weights, content = _read_shards(path), {}
    elif path.suffix == ".safetensors":
        weights, content = _read_safetensors(path), {}
    else:
        content = _unpickle(path)
        weights = next((content[k] for k in ("network_weights", "state_dict", "model") if k in content), content)
        weights = weights if isinstance(weights, dict) else {}
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite, the file is damaged or its training failed")
    return weights, content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # each kind of damage has an error of its own
        raise ValueError(f"{path} is damaged or not a safetensors file ({_first_line(error)})") from None


def _unpickle(path: Path) -> dict:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds more than tensors and plain values ({culprit[1]})" if culprit else "is damaged or holds objects"
        raise ValueError(
            f"{path} {what}: loading it could run code, so it is refused; ask its author for a .safetensors file"
        ) from None
    except Exception as error:  # a damaged pickle fails anywhere
        raise ValueError(f"{path} is damaged or not a checkpoint ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index}: damaged, it names no files")
    weights = {}
    for name in dict.fromkeys(shards.values()):
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):  # it could name any file here
            raise ValueError(f"{index} names {name}, which is not a weight file beside it: refused")
        weights |= _read_safetensors(index.parent / name)
    return weights


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
