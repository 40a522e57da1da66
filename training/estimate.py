"""What a step will cost, found by running it on tensors without data."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from data.stored_volume import HeldVolume
from data.stream import Batch, SampleStream, stack_views
from models.distributed import Traffic, count_traffic

from .attention import Attention
from .recipe import Recipe

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION = {  # the kernels of CPUs, of shapes; torch counts those of GPUs only
    FORWARD: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
FORMULAS = FlopCounterMode(display=False, custom_mapping=ATTENTION).flop_registry  # operator -> its operations


class StepCost(NamedTuple):
    """What one rank's share of a micro-batch takes, forward and backward."""

    volumes: int
    views: int
    flops: int  # a multiply-add counts as two, recomputation counts
    timeline: list[tuple[int, int]]  # bytes of complete gradients, and the most of all else while there were so many
    traffic: Traffic  # of the losses: what is gathered and summed over ranks
    attention: Counter[Attention]  # each call of the step's

    @property
    def peak_bytes(self) -> int:
        """The most bytes of batch, activations and what operators pass on, without weights and gradients."""
        return max(rest for _, rest in self.timeline)


def noise_batch(
    build_stream: Callable[..., SampleStream],
    make_batch: Callable[..., Batch],
    recipe: Recipe,
    volumes: int = 1,
    device: torch.device | str = "cpu",
) -> Batch:
    """What the method's own stream makes of a volume of noise in memory.

    Args:
        build_stream, make_batch: of the script.
    """
    noise = np.random.default_rng(0).normal(size=(recipe.data.num_channels, *recipe.views.crop_size))
    labels = np.zeros(recipe.views.crop_size, np.uint8)
    stream = build_stream([HeldVolume(noise.astype(np.float32), labels=labels)], recipe)
    return make_batch(stack_views([stream[i] for i in range(volumes)]), torch.device(device), recipe)


class _Step(nn.Module):
    """Forward and backward as one call, so that recomputation in the backward pass sees the same weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> None:
        self.model(**inputs)["loss"].backward()


class _Operations(TorchDispatchMode):
    """Counts as `FlopCounterMode` does, without its hooks on modules, which keep what is recomputed until gc runs."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # whoever looks on may compile

    def __init__(self):
        super().__init__()
        self.total = 0
        self.attention: Counter[Attention] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in ATTENTION:
            backward = function.overloadpacket is not FORWARD
            query, key = args[backward : backward + 2]
            self.attention[Attention(tuple(query.shape), tuple(key.shape), query.dtype, backward)] += 1
        if formula := FORMULAS.get(function.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class LiveBytes(TorchDispatchMode):
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


def step_cost(
    model: nn.Module,
    sample: Batch,
    volumes: int,
    ranks: int = 1,
    follow: Callable[[list[torch.Tensor]], LiveBytes] = LiveBytes,
    watch: Sequence[TorchDispatchMode] = (),
) -> StepCost:
    """Find what one forward and backward pass takes; nothing is computed or allocated.

    Args:
        model: on the CPU, not yet wrapped, without a process group or in one that only pretends.
        sample: a batch of one volume (`noise_batch`), of which the shapes count.
        volumes: in the batch to be counted.
        ranks: whose rows the losses and the heads' batch norm gather, pretended if there is no process group.
        follow: made of the weights, keeps the bytes.
        watch: see every operator too.
    """
    with FakeTensorMode() as mode, _Operations() as operations, count_traffic(ranks) as traffic:
        held = (*model.named_parameters(), *model.named_buffers())
        weights = {name: mode.from_tensor(tensor) for name, tensor in held}
        live = follow([*weights.values()])
        for weight in weights.values():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(live.keep_gradient)
        with live, ExitStack() as watchers:
            for watcher in watch:
                watchers.enter_context(watcher)
            fakes: dict[int, torch.Tensor] = {}  # one for each tensor: a batch may hold the same one twice
            for tensor in sample.values():
                shape = (volumes * tensor.shape[0], *tensor.shape[1:])
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = torch.zeros(shape, dtype=tensor.dtype)
            batch = {key: fakes[id(tensor)] for key, tensor in sample.items()}
            functional_call(_Step(model), {f"model.{name}": weight for name, weight in weights.items()}, kwargs=batch)
    return StepCost(volumes, len(batch["views"]), operations.total, live.timeline, traffic, operations.attention)
