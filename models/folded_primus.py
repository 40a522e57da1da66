"""The blocks of a Primus for compiled training: the same function, in fewer passes over the tokens.

What acts on channels alone, scale and shift of a norm and LayerScale, is applied to the weights of the linear layer
beside it, which are a hundredth of the tokens of a step, and layers that read the same tokens are one. In the backward
pass the gradients of norms and scales then come from those of the weights instead of from the tokens again. Results
differ from those of `PrimusBlock` by rounding.

Linear layers are read, not called: for networks of plain layers, without adapters or ZeRO-3, whose hooks want calls.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_primus import PrimusBlock


def fold_blocks(network: nn.Module) -> None:
    """Let every `PrimusBlock` of a network compute by `folded_block`; weights and their names stay."""
    for module in network.modules():
        if isinstance(module, PrimusBlock):
            module.forward = MethodType(folded_block, module)


def folded_block(
    block: PrimusBlock, x: torch.Tensor, turns: torch.Tensor, kept: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """What `PrimusBlock.forward` computes: tokens `[B, N, C]`, `rotary_turns`, `drop_paths` -> `[B, N, C]`."""
    attention, mlp = block.attention, block.mlp
    q, k = norm_and_linear(x, block.norm1, [attention.q_proj, attention.k_proj]).chunk(2, dim=-1)
    v = norm_and_linear(x, block.norm1, [attention.v_proj])
    q, k, v = (tokens.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for tokens in (q, k, v))
    branch = norm_and_linear(attention.attend(q, k, v, turns), attention.norm, [attention.proj], block.scale1)
    x = x + (branch if kept is None else kept[0] * branch)

    gate, up = norm_and_linear(x, block.norm2, [mlp.gate, mlp.up]).chunk(2, dim=-1)
    branch = norm_and_linear(F.silu(gate) * up, mlp.norm, [mlp.down], block.scale2)
    return x + (branch if kept is None else kept[1] * branch)


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
