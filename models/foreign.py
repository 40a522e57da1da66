"""Encoders out of the weights of others: which network it is and its sizes, from the tensors and from their plan."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .adaptation_plans import Plan, architecture_of, numbers_of, read_plan
from .architectures import ARCHITECTURES, architecture, names_in_nnunet
from .conversion import from_reference, unwrapped, what_is_there
from .nnunet import fresh_decoder
from .warm_start import report, token_order_of, under_our_names
from .weight_files import read_weights

Weights = dict[str, torch.Tensor]


class Recognised(NamedTuple):
    path: Path
    name: str  # of the row of `ARCHITECTURES`
    weights: Weights  # as they are called in the file
    inside: Weights  # of the network that is meant, under the reference's names
    sizes: dict[str, Any]  # of our configuration
    plan: Plan


class Foreign(NamedTuple):
    encoder: PreTrainedModel  # its configuration does not say how volumes are prepared
    decoder: Weights | None  # of a U-Net that nnU-Net loads whole, if all of it is there
    changed: list[str]  # how tensors had to be adapted
    report: str  # what was loaded, changed and left


def recognise(path: Path) -> Recognised:
    """Which encoder a file that others wrote is of.

    Args:
        path: `.pth` or `.safetensors`; see adaptation_plans.py for what lies beside it.

    Raises:
        ValueError: if there is no encoder in it that we have, or if its plan is of another one.
    """
    weights, content = read_weights(path)
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}  # torch.compile's mark
    plan = read_plan(path, content)
    try:
        name = _architecture(weights, plan)
        inside, _ = unwrapped(weights, name, plan.key_to_stem)
        return Recognised(path, name, weights, inside, _sizes(inside, plan, name), plan)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def build(found: Recognised, token_order: str | None = None, crop_size: tuple[int, ...] | None = None) -> Foreign:
    """Our encoder with these weights.

    Args:
        token_order: "xyz" or "yxz", as for `load_pretrained`.
        crop_size: voxels; for a position embedding it must be that of the pretraining.

    Raises:
        ValueError: if tensors are missing or too many, or if something is not told.
    """
    plan, names = found.plan, names_in_nnunet(found.name)
    try:
        config = _at_crop(found, crop_size)
        order = (token_order or plan.token_order or token_order_of(plan.trainer)) if names.from_yxz else "xyz"
        encoder = architecture(found.name).model(config)
        wanted = {n: w.shape for n, w in encoder.state_dict().items()}
        decoder = {f"decoder.{n}": w.shape for n, w in fresh_decoder(config).items()}
        size, stem = config.image_size, plan.key_to_stem
        done = from_reference(found.weights, wanted | decoder, config, order, size, stem)
    except ValueError as error:
        raise ValueError(f"{found.path}: {error}") from None
    encoder.load_state_dict({n: done.weights[n] for n in wanted})
    has_decoder = bool(decoder) and decoder.keys() <= done.weights.keys()
    rest = {n.removeprefix("decoder."): done.weights[n] for n in decoder} if has_decoder else None
    words = report(found.path, done, done.weights.keys() - wanted.keys(), wanted.keys())
    return Foreign(encoder, rest, done.changed, words)


def _architecture(weights: Weights, plan: Plan) -> str:
    """The row of `ARCHITECTURES`, of which tensors and plan must be."""
    told = architecture_of(plan)
    rows = {key: row for key, row in ARCHITECTURES.items() if row.nnunet and row.nnunet.sizes}
    if any(under_our_names(weights, row.input_weights[0]) is not None for row in ARCHITECTURES.values()):
        raise ValueError("these are weights of this project: publish the run, or the folder, that they come from")
    found = [key for key, row in rows.items() if any(name.endswith(row.nnunet.anchor) for name in weights)]
    if not found:
        anchors = ", ".join(row.nnunet.anchor for row in rows.values())
        raise ValueError(f"there is no encoder of this project in it (looked for {anchors}){what_is_there(weights)}")
    if told and told not in found:
        raise ValueError(
            f"its plan is of a {plan.network}, its tensors are those of a {found[-1]}: put the right "
            "adaptation_plan.json beside it"
        )
    return told or found[-1]  # later versions hold what marks those before


def _sizes(inside: Weights, plan: Plan, name: str) -> dict[str, Any]:
    """The numbers of our configuration; ValueError where plan and tensors disagree."""
    told, names = numbers_of(plan), names_in_nnunet(name)
    shape = list(inside[names.root + names.anchor].shape)
    if len(shape) != 5:
        raise ValueError(f"its first kernels ({names.root}{names.anchor}) are {shape}: it is no network of volumes")
    try:
        sizes = names.sizes(inside, told)
    except (LookupError, TypeError):
        raise ValueError(f"its tensors do not have the shapes of those of a {name}: it is damaged") from None
    wrong = [f"{key}={told[key]}, the tensors {sizes[key]}" for key in told if key in sizes and told[key] != sizes[key]]
    if wrong:
        raise ValueError(
            f"its plan ({plan.network or 'of no named network'}) says {'; '.join(wrong)}: put the right "
            "adaptation_plan.json beside it, or none and say the rest yourself"
        )
    return sizes


def _at_crop(found: Recognised, crop_size: tuple[int, ...] | None) -> PretrainedConfig:
    """The configuration for the crop of the pretraining: the first that is told and that this network can have seen."""
    row, sizes, plan = architecture(found.name), found.sizes, found.plan
    told = (crop_size,) if crop_size else plan.crops
    position = found.inside.get(names_in_nnunet(found.name).keys["key_to_lpe"])
    if position is not None and position.ndim == 3:
        unit, tokens = sizes["patch_size"], position.shape[1] - sizes.get("num_register_tokens", 0)
        cube = tuple(round(tokens ** (1 / 3)) * side for side in unit)
        told = [crop for crop in (*told, cube) if math.prod(n // u for n, u in zip(crop, unit)) == tokens]
        what = f"{tokens} tokens of {times(unit)} voxels, as its position embedding has them"
    else:
        unit = row.unit(row.config(**sizes))
        what = f"cells of {times(unit)} voxels"
    fitting = [crop for crop in told if not any(n % u for n, u in zip(crop, unit))]
    if not fitting:
        said = ", ".join(times(crop) for crop in ((crop_size,) if crop_size else plan.crops)) or "none is told"
        raise ValueError(
            f"no crop of its pretraining is known that divides into {what} ({said}): say it, as in "
            "--crop-size 128 128 128"
        )
    return row.config(image_size=fitting[0], **sizes)


def times(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))
