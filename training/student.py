"""The student of a recipe: an encoder, and around it what a method asks for."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from data.normalisation import BOX
from models import architecture, build_encoder

from .intensity_in_words import normalisation, padding_value
from .recipe import Recipe


def preprocessing(
    orientation: str,
    spacing: tuple[float, ...],
    crop_size: tuple[int, ...],
    intensity: Mapping = BOX,
    intensity_of_ct: Mapping | None = None,
) -> dict:
    """What must be done to a volume before the encoder sees it, in this order; goes into config.json."""
    return {
        "orientation": orientation,
        "crop_to_nonzero_box": intensity["rule"] == "box",
        "normalisation": normalisation(intensity, intensity_of_ct),
        "intensity": dict(intensity),
        "intensity_of_ct": intensity_of_ct and dict(intensity_of_ct),
        "spacing": list(spacing),
        "interpolation": "cubic; nearest along an axis more than 3 times coarser than the finest",
        "crop_size": list(crop_size),
        "padding_value": padding_value(intensity),
    }


def build_student(recipe: Recipe, *, reconstructs: bool, dense: bool, pooled: bool) -> nn.Module:
    """A fresh student, the same on every rank; heads that are built next are too.

    Args:
        reconstructs, dense, pooled: whether voxels, dense and pooled features are wanted of it.
    """
    torch.manual_seed(recipe.seed)
    prepared_as = preprocessing(
        recipe.data.orientation, recipe.data.spacing, recipe.views.crop_size, **recipe.data.rules()
    )
    name, sizes = recipe.model.architecture, recipe.model.encoder_arguments()
    encoder = build_encoder(name, recipe.views.crop_size, prepared_as, **sizes)
    wanted = {"reconstructs": reconstructs, "dense": dense, "pooled": pooled}
    student = architecture(name).student(encoder, recipe.model, recipe.mask.ratio, **wanted)
    if recipe.run.gradient_checkpointing:
        checkpoint_gradients(student)
    return student


def checkpoint_gradients(student: nn.Module) -> None:
    """Let each block keep its input only; the decoders' too, which transformers' own switch does not reach."""
    for module in student.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
