"""What a step will cost, found by running it on tensors without data."""

import math

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from .recipe import Recipe


def step_inputs(recipe: Recipe, volumes: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what the composite is called with, for a batch of `volumes`."""
    crop, views = recipe.views.crop_size, recipe.views
    cells, samples = math.prod(views.cells), math.prod(views.samples_per_cell)
    image = ((2 * volumes, 1, *crop), torch.float32)
    return {
        "views": image,
        "target": image,
        "mask": ((2 * volumes, *(size // recipe.mask.block for size in crop)), torch.bool),
        "points": ((2 * volumes, cells, samples, 3), torch.float32),
        "inside": ((2 * volumes, cells), torch.bool),
        "pair": ((2 * volumes,), torch.int64),
    }


class _Step(nn.Module):
    """Forward and backward as one call, so that recomputation in the backward pass sees the same weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> None:
        self.model(**inputs)["loss"].backward()


def step_cost(model: nn.Module, inputs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, float]:
    """Floating point operations and memory of one forward and backward pass; nothing is computed or allocated.

    Args:
        model: on the CPU, not yet wrapped, without a process group; its forward returns a dict with `loss`.
        inputs: shape and dtype of each argument of its forward.

    Returns:
        `flops` (a multiply-add counts as two, recomputation counts) and `activation_bytes` kept for the backward pass.
    """
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        weights = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
        fakes = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in inputs.items()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            functional_call(_Step(model), {f"model.{name}": weight for name, weight in weights.items()}, kwargs=fakes)
    return {"flops": counter.get_total_flops(), "activation_bytes": sum(kept.values())}
