"""Where the state of a run lives: each weight and each moment of the optimiser as pieces of one flat tensor.

Every strategy keeps a tensor whole (plain data parallel), cut in rows (FSDP2) or cut anywhere (ZeRO). All of these are
ranges of the flattened tensor, so one description serves to save and to load, with whatever strategy and number of
ranks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}


class Piece(NamedTuple):
    """A range of a flattened tensor that this rank holds."""

    name: str  # model.NAME or MOMENT.NAME
    values: torch.Tensor  # [n], the memory itself: what is written here is what trains
    start: int  # of the range, in the flattened tensor
    size: int  # of the flattened tensor
    whole: bool  # every rank holds all of it
    copy: bool = False  # another piece of this rank has the same numbers


def pieces(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> Iterator[Piece]:
    """All pieces of this rank, in the same order on every run; moments that do not exist yet are created as 0.

    Args:
        model, optimizer: as `accelerator.prepare` returned them.
    """
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    module, optimizer = accelerator.unwrap_model(model), torch_optimizer(optimizer)
    for name, tensor in (*module.named_parameters(), *_saved_buffers(module)):
        yield from _held(f"model.{name}", tensor, accelerator.process_index)
        if not tensor.requires_grad:
            continue
        if deepspeed:
            yield from _of_deepspeed(name, tensor, model.optimizer, optimizer, accelerator.process_index)
        else:
            for moment, value in _moments(optimizer, tensor).items():
                yield from _held(f"{moment}.{name}", value, accelerator.process_index)


def torch_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimiser of torch inside those of Accelerate and DeepSpeed."""
    while type(optimizer).__name__ not in MOMENTS:
        optimizer = optimizer.optimizer
    return optimizer


def updates_made(optimizer: Optimizer) -> int:
    """How often the optimiser has changed the weights, which AdamW's bias correction depends on."""
    states = torch_optimizer(optimizer).state.values()
    return int(max((state["step"] for state in states if "step" in state), default=0))


def set_updates_made(optimizer: Optimizer, updates: int) -> None:
    for state in torch_optimizer(optimizer).state.values():
        if "step" in state:
            state["step"].fill_(updates)


def _held(name: str, tensor: torch.Tensor, rank: int) -> Iterator[Piece]:
    if isinstance(tensor, DTensor):  # FSDP2: rows, as torch.chunk cuts them
        (placement,), ranks = tensor.placements, tensor.device_mesh.size()
        assert placement.is_shard(0)
        rows = -(-tensor.shape[0] // ranks)
        start = min(rank * rows, tensor.shape[0]) * math.prod(tensor.shape[1:])
        yield Piece(name, tensor.to_local().detach().view(-1), start, tensor.numel(), whole=False)
    elif hasattr(tensor, "ds_tensor"):  # ZeRO-3: equal shares, the last one padded
        share, total = tensor.ds_tensor.numel(), tensor.ds_numel
        start = min(rank * share, total)
        yield Piece(name, tensor.ds_tensor.detach().view(-1)[: total - start], start, total, whole=False)
    else:
        yield Piece(name, tensor.detach().view(-1), 0, tensor.numel(), whole=True)


def _of_deepspeed(name: str, parameter: nn.Parameter, zero, optimizer: Optimizer, rank: int) -> Iterator[Piece]:
    """DeepSpeed trains flat tensors of its own, which hold many parameters each, and copies them to the weights."""
    if hasattr(parameter, "ds_tensor"):
        group, offset, share = zero.grad_position[zero.get_param_id(parameter)]
        flat, start = zero.fp32_partitioned_groups_flat[group], min(rank * share, parameter.ds_numel)
        size = parameter.ds_numel
        count = min(share, size - start)
    elif parameter._hp_mapping is not None:
        held = parameter._hp_mapping
        flat = zero.single_partition_of_fp32_groups[held.param_group_index]
        offset, count = held.hp_fragment_address.start, held.hp_fragment_address.numel
        start, size = held.lp_fragment_address.start, parameter.numel()
    else:  # on another rank
        return
    yield Piece(f"model.{name}", flat.detach()[offset : offset + count], start, size, whole=False, copy=True)
    for moment, value in _moments(optimizer, flat).items():
        yield Piece(f"{moment}.{name}", value[offset : offset + count], start, size, whole=False)


def _moments(optimizer: Optimizer, trained: torch.Tensor) -> dict[str, torch.Tensor]:
    state = optimizer.state[trained]
    names = MOMENTS[type(optimizer).__name__]
    if names[0] not in state and optimizer.defaults.get("momentum") != 0:
        state |= {moment: torch.zeros_like(trained) for moment in names}
        if isinstance(optimizer, torch.optim.AdamW):
            state["step"] = torch.zeros((), device=trained.device)
    return {moment: state[moment] for moment in names if state.get(moment) is not None}


def _saved_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    saved = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in saved]


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of this rank's generators, which drop-path draws from."""
    state = {"random.cpu": torch.get_rng_state()}
    return state | ({"random.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(saved: dict[str, torch.Tensor], seed: int) -> None:
    """Take up what `random_state` returned, or begin with a seed; ranks differ in it."""
    torch.manual_seed(seed)
    if "random.cpu" in saved:
        torch.set_rng_state(saved["random.cpu"])
    if "random.cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["random.cuda"])
