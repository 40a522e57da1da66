"""Gathering tensors over ranks without cutting the gradient."""

import torch
import torch.distributed as dist


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # every rank's loss may depend on every rank's rows
        return gradient[dist.get_rank()]


def gather_with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    """Stack a tensor of equal shape from every rank: `[...]` -> `[ranks, ...]`; the identity `[1, ...]` on one rank.

    Backward gives each rank the gradient of the sum of all ranks' losses, which data parallel training then averages.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor[None]
    return _AllGather.apply(tensor)
