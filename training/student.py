"""The student of a recipe: an encoder, and around it what a method asks for."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from data.normalisation import BOX
from models import architecture, build_encoder

from .estimate import FORMULAS
from .intensity_in_words import normalisation, padding_value
from .recipe import PretrainingRecipe, Recipe


def preprocessing(
    orientation: str,
    spacing: tuple[float, ...] | str,
    crop_size: tuple[int, ...],
    intensity: Mapping = BOX,
    intensity_of_ct: Mapping | None = None,
    channels: Sequence[str] = (),
    coarsest_last: bool = False,
) -> dict:
    """What must be done to a volume before the encoder sees it, in this order; goes into config.json."""
    return {
        "orientation": orientation,
        "crop_to_nonzero_box": intensity["rule"] == "box",
        "normalisation": normalisation(intensity, intensity_of_ct),
        "intensity": dict(intensity),
        "intensity_of_ct": intensity_of_ct and dict(intensity_of_ct),
        "spacing": spacing if isinstance(spacing, str) else list(spacing),
        "interpolation": "cubic; linear along an axis more than 3 times coarser than the finest",
        "channels": list(channels),
        "coarsest_last": coarsest_last,
        "crop_size": list(crop_size),
        "padding_value": padding_value(intensity),
    }


def build_fresh_encoder(recipe: Recipe) -> PreTrainedModel:
    """The recipe's encoder with random weights, the same on every rank; what is built next has the same everywhere."""
    torch.manual_seed(recipe.seed)
    data, views = recipe.data, recipe.views
    prepared_as = preprocessing(
        data.orientation,
        data.spacing,
        views.crop_size,
        **data.rules(),
        channels=data.channels,
        coarsest_last=views.coarsest_last,
    )
    name, sizes = recipe.model.architecture, recipe.model.encoder_arguments()
    return build_encoder(name, views.crop_size, prepared_as, num_channels=data.num_channels, **sizes)


def build_student(recipe: PretrainingRecipe, *, reconstructs: bool, dense: bool, pooled: bool) -> nn.Module:
    """A fresh student, the same on every rank; heads that are built next are too.

    Args:
        reconstructs, dense, pooled: whether voxels, dense and pooled features are wanted of it.
    """
    encoder = build_fresh_encoder(recipe)
    wanted = {"reconstructs": reconstructs, "dense": dense, "pooled": pooled}
    student = architecture(recipe.model.architecture).student(encoder, recipe.model, recipe.mask.ratio, **wanted)
    if recipe.run.gradient_checkpointing:
        checkpoint_gradients(student, recipe.run.gradient_checkpointing)
    return student


def checkpoint_gradients(student: nn.Module, how: Literal[True, "selective"] = True) -> None:
    """Let each block keep its input only; the decoders' too, which transformers' own switch does not reach.

    Args:
        how: "selective" lets them keep what matrix products, convolutions and attention return as well, so that only
            what is cheap is computed again: norms, activations, rotations, sums, changes of precision.
    """
    again = partial(checkpoint, use_reentrant=False)
    if how == "selective":
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, _keep_what_multiplies))
    for module in student.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = again


def _keep_what_multiplies(context, operator, *args, **kwargs) -> CheckpointPolicy:
    kept = operator.overloadpacket in FORMULAS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
