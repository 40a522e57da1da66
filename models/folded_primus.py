"""The blocks of a Primus for compiled training: the same function, in fewer passes over the tokens.

What acts on channels alone, scale and shift of a norm and LayerScale, is applied to the weights of the linear layer
beside it, which are a hundredth of the tokens of a step, and layers that read the same tokens are one. In the backward
pass the gradients of norms and scales then come from those of the weights instead of from the tokens again. Results
differ from those of `PrimusBlock` by rounding.

Linear layers are read, not called: for networks of plain layers, without adapters or ZeRO-3, whose hooks want calls.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_primus import PrimusBlock


class FoldedBlock(PrimusBlock):
    """Computes what `PrimusBlock` does, of weights with the same names."""

    def forward(self, x, turns, kept=None):
        attention, mlp = self.attention, self.mlp
        q, k = norm_and_linear(x, self.norm1, [attention.q_proj, attention.k_proj]).chunk(2, dim=-1)
        v = norm_and_linear(x, self.norm1, [attention.v_proj])  # apart: it is kept for the backward pass, q and k not
        q, k, v = (tokens.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for tokens in (q, k, v))
        branch = norm_and_linear(attention.attend(q, k, v, turns), attention.norm, [attention.proj], self.scale1)
        x = x + (branch if kept is None else kept[0] * branch)

        gate, up = norm_and_linear(x, self.norm2, [mlp.gate, mlp.up]).chunk(2, dim=-1)
        branch = norm_and_linear(F.silu(gate) * up, mlp.norm, [mlp.down], self.scale2)
        return x + (branch if kept is None else kept[1] * branch)


FoldedBlock.__name__ = PrimusBlock.__name__  # by which a network's `_no_split_modules` finds its blocks


def fold_blocks(network: nn.Module) -> None:
    """Let every `PrimusBlock` of a network be a `FoldedBlock`."""
    for module in network.modules():
        if type(module) is PrimusBlock:
            module.__class__ = FoldedBlock


def norm_and_linear(
    x: torch.Tensor, norm: nn.LayerNorm, layers: list[nn.Linear], scale: torch.Tensor | None = None
) -> torch.Tensor:
    """`scale * layer(norm(x))` of each layer, side by side: `[..., C]` -> `[..., sum of out_features]`."""
    with torch.autocast(x.device.type, enabled=False):  # weights in float32; tokens as they came, normed in float32
        weight = torch.cat([layer.weight for layer in layers]).float()
        biases = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat(biases) + (weight * norm.bias).sum(dim=1)
        weight = weight * norm.weight
        if scale is not None:
            weight, bias = weight * scale[:, None], bias * scale
        x = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    return F.linear(x, weight, bias)
