"""What a step will cost, found by running it on tensors without data."""

import math
import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from .recipe import Recipe

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def step_inputs(recipe: Recipe, volumes: int) -> Shapes:
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


def random_batch(inputs: Shapes, mask_ratio: float, device: torch.device) -> dict[str, torch.Tensor]:
    """What the composite is called with (`step_inputs`), of noise: equally many blocks masked, every place reached."""
    batch = {key: torch.zeros(shape, dtype=dtype, device=device) for key, (shape, dtype) in inputs.items()}
    batch["views"].normal_()
    batch["target"].copy_(batch["views"])
    hidden = batch["mask"].flatten(1)
    hidden[:, : int(mask_ratio * hidden.shape[1])] = True
    batch["points"].uniform_(0, min(batch["views"].shape[2:]) - 1)
    batch["inside"].fill_(True)
    batch["pair"].copy_(torch.arange(len(batch["pair"]) // 2).repeat(2))
    return batch


class _Step(nn.Module):
    """Forward and backward as one call, so that recomputation in the backward pass sees the same weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> None:
        self.model(**inputs)["loss"].backward()


class _LiveBytes(TorchDispatchMode):
    """Follows the storages that operators return, from their first sight until Python and autograd let go of them."""

    def __init__(self, weights: list[torch.Tensor]):
        super().__init__()
        self.sizes = {weight.untyped_storage()._cdata: 0 for weight in weights}  # weights do not count
        self.live = self.gradients = 0
        self.timeline = [(0, 0)]  # (bytes of complete gradients, most bytes of all else while there were so many)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self.live += storage.nbytes()
        self._note()

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)

    def _note(self) -> None:
        complete, most = self.timeline[-1]
        rest = self.live - self.gradients
        if complete == self.gradients:
            self.timeline[-1] = (complete, max(most, rest))
        else:
            self.timeline.append((self.gradients, rest))

    def keep_gradient(self, weight: torch.Tensor) -> None:
        """Count what has come into `weight.grad` as a gradient from now on."""
        self.gradients += self.sizes.get(weight.grad.untyped_storage()._cdata, 0)
        self._note()


def step_cost(model: nn.Module, inputs: Shapes) -> dict[str, Any]:
    """Floating point operations and memory of one forward and backward pass; nothing is computed or allocated.

    Args:
        model: on the CPU, not yet wrapped; its forward returns a dict with `loss`.
        inputs: shape and dtype of each argument of its forward.

    Returns:
        `flops` (a multiply-add counts as two, recomputation counts); `timeline`, pairs of the bytes of complete
        gradients and the most bytes of all else (batch, activations, what operators pass on, but not weights) while
        there were so many; `peak_bytes`, the most of the latter.
    """
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        weights = {name: mode.from_tensor(p) for name, p in model.named_parameters()}
        live = _LiveBytes([*weights.values()])
        for weight in weights.values():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(live.keep_gradient)
        with live:
            fakes = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in inputs.items()}
            functional_call(_Step(model), {f"model.{name}": weight for name, weight in weights.items()}, kwargs=fakes)
    return {
        "flops": counter.get_total_flops(),
        "peak_bytes": max(rest for _, rest in live.timeline),
        "timeline": live.timeline,
    }
