"""Prototypes of self-distillation (Caron et al. 2021, DINO): the head that compares with them, and its centre."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import gather_with_gradient


class PrototypeHead(nn.Module):
    """Rows `[..., D]` -> their cosines with each prototype `[..., K]`, in float32 (the head of DINO).

    Prototypes are brought to unit length here: ZeRO-3 would not see a parametrisation.
    """

    def __init__(self, in_size: int, hidden_size: int, out_size: int, prototypes: int):
        super().__init__()
        widths = (in_size, hidden_size, hidden_size, out_size)
        first, second, third = (nn.Linear(*pair) for pair in pairwise(widths))
        for layer in (first, second, third):  # of any width, what is brought to unit length is not tiny
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        self.prototypes = nn.Parameter(torch.randn(prototypes, out_size) * out_size**-0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(rows.device.type, enabled=False):  # divided by .04, bfloat16 would leave tenths
            return F.linear(F.normalize(self.layers(rows.float()), dim=-1), F.normalize(self.prototypes, dim=-1))


class Centre(nn.Module):
    """The running mean of a head's logits, which keeps the teacher from one prototype for all (DINO, eq. 4).

    A forward pass in training only notes the mean of its batch, over all ranks; `move` follows once a step. So all
    micro-batches of a step have one centre.
    """

    def __init__(self, prototypes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(prototypes))
        self.register_buffer("noted", torch.zeros(prototypes), persistent=False)
        self.register_buffer("times", torch.zeros(()), persistent=False)

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """The centre `[K]` of logits `[..., K]`."""
        if self.training:
            self.noted += gather_with_gradient(logits.flatten(0, -2).mean(0)).mean(0)
            self.times += 1
        return self.mean

    @torch.no_grad()
    def move(self, momentum: float, sound: torch.Tensor) -> None:
        """Towards what was noted, which is then forgotten; not at all where the step was not `sound`.

        The first time all the way: from 0, all crops would agree on one prototype before the centre is there.
        """
        moved = torch.lerp(self.noted / self.times, self.mean, momentum * self.mean.any())
        self.mean.copy_(torch.where(sound, moved, self.mean))
        self.noted.zero_()
        self.times.zero_()
