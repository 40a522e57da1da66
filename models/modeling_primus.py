"""Primus: a plain 3D vision transformer with EVA-02 blocks (Wald et al. 2025, arXiv 2503.01835).

Needs torch and transformers only: this file and its configuration are copied next to the weights.
Tokens are numbered with X slowest and Z fastest, the order of `[B, C, X, Y, Z].flatten(2)`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_primus import PrimusConfig


def rotary_table(grid_size, head_size, theta, device):
    """Cosines and sines of the axial 3D rotary embedding, each `[tokens, head_size / 2]`, in float32.

    A third of the channel pairs turns with each axis, at `head_size / 6` frequencies from 1 down to 1 / theta.
    """
    bands = head_size // 6
    frequencies = theta ** (-torch.arange(bands, device=device, dtype=torch.float32) / bands)
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid_size]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [x, y, z, 3]
    angles = (positions[..., None] * frequencies).reshape(-1, 3 * bands)
    return angles.cos(), angles.sin()


def rotate(heads, cos, sin):
    """Turn neighbouring channel pairs of `[B, heads, tokens, head_size]` by the angles of `rotary_table`."""
    even, odd = heads[..., 0::2], heads[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(heads.dtype)


class DropPath(nn.Module):
    """Drop the residual branch of whole samples, and scale the others so that the expectation stays (training only)."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep).div_(keep)


class PrimusAttention(nn.Module):
    """Self-attention with rotary positions, no key bias, and a LayerNorm before the output projection."""

    def __init__(self, hidden_size, num_heads, eps, output_std):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.proj.init_std = output_std

    def forward(self, x, cos, sin):
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(self.norm(x.transpose(1, 2).flatten(2)))


class PrimusMLP(nn.Module):
    """SwiGLU with a LayerNorm on the hidden layer."""

    def __init__(self, hidden_size, mlp_ratio, eps, output_std):
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.gate = nn.Linear(hidden_size, inner)
        self.up = nn.Linear(hidden_size, inner)
        self.norm = nn.LayerNorm(inner, eps=eps)
        self.down = nn.Linear(inner, hidden_size)
        self.down.init_std = output_std

    def forward(self, x):
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class PrimusBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each with LayerScale and DropPath."""

    def __init__(self, config, num_heads, layer, drop_path):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        output_std = config.initializer_range / math.sqrt(2 * (layer + 1))  # deeper layers start smaller, as in BEiT
        self.norm1 = nn.LayerNorm(size, eps=eps)
        self.attention = PrimusAttention(size, num_heads, eps, output_std)
        self.scale1 = nn.Parameter(torch.full((size,), config.layer_scale_init))
        self.norm2 = nn.LayerNorm(size, eps=eps)
        self.mlp = PrimusMLP(size, config.mlp_ratio, eps, output_std)
        self.scale2 = nn.Parameter(torch.full((size,), config.layer_scale_init))
        self.layer_scale_init = config.layer_scale_init
        self.drop_path = DropPath(drop_path)

    def forward(self, x, cos, sin):
        x = x + self.drop_path(self.scale1 * self.attention(self.norm1(x), cos, sin))
        return x + self.drop_path(self.scale2 * self.mlp(self.norm2(x)))


class PrimusTransformer(nn.Module):
    """Position embedding, blocks and final norm: the encoder's trunk, and the shape of the pretraining decoders."""

    def __init__(self, config, num_layers, num_heads, drop_path_rate=0.0):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.position_embedding = nn.Parameter(torch.zeros(1, math.prod(config.grid_size), config.hidden_size))
        rates = [drop_path_rate * i / max(num_layers - 1, 1) for i in range(num_layers)]
        self.blocks = nn.ModuleList(PrimusBlock(config, num_heads, i, rate) for i, rate in enumerate(rates))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, tokens, visible_tokens=None, hidden_states=None):
        """Tokens `[B, N, C]` -> `[B, N, C]`, or `[B, K, C]` where `visible_tokens` `[B, K]` numbers those to keep.

        What each layer receives is appended to `hidden_states` if a list is given.
        """
        tokens = tokens + self.position_embedding
        head_size = self.config.hidden_size // self.num_heads
        cos, sin = rotary_table(self.config.grid_size, head_size, self.config.rope_theta, tokens.device)
        if visible_tokens is not None:
            tokens = tokens.gather(1, visible_tokens[..., None].expand(-1, -1, tokens.shape[-1]))
            cos, sin = cos[visible_tokens][:, None], sin[visible_tokens][:, None]  # [B, 1, K, head_size / 2]
        for block in self.blocks:
            if hidden_states is not None:
                hidden_states.append(tokens)
            tokens = block(tokens, cos, sin)
        return self.norm(tokens)


def init_primus_weights(module, std=0.02):
    """Initialise one module as Primus does: truncated normal for linear layers, He for convolutions, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=getattr(module, "init_std", std))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=1e-2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PrimusBlock):
        nn.init.constant_(module.scale1, module.layer_scale_init)
        nn.init.constant_(module.scale2, module.layer_scale_init)
    elif isinstance(module, PrimusTransformer):
        nn.init.trunc_normal_(module.position_embedding, std=std)


class PrimusModel(PreTrainedModel):
    """The Primus encoder: crop -> tokens.

    Args:
        config: the sizes, see `PrimusConfig`.
    """

    config_class = PrimusConfig
    base_model_prefix = "primus"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["PrimusBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.patch_embed = nn.Conv3d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.transformer = PrimusTransformer(
            config, config.num_hidden_layers, config.num_attention_heads, config.drop_path_rate
        )
        self.post_init()

    def _init_weights(self, module):
        init_primus_weights(module, self.config.initializer_range)

    def forward(self, pixel_values, visible_tokens=None, output_hidden_states=False):
        """Encode crops `[B, C, X, Y, Z]` of the configured `image_size`, prepared as `config.preprocessing` says.

        Args:
            visible_tokens: `[B, K]` integer, the token numbers to keep (masked pretraining); all tokens if None.
            output_hidden_states: also return what each layer received and the last output.

        Returns:
            `last_hidden_state` `[B, N or K, hidden_size]`, `pooler_output` `[B, hidden_size]` (mean of the tokens) and
            `hidden_states`, a tuple of `num_hidden_layers + 1` such token tensors, or None.

        Raises:
            ValueError: if the crops are not of `config.image_size`.
        """
        if list(pixel_values.shape[2:]) != list(self.config.image_size):
            raise ValueError(
                f"this encoder takes crops of {tuple(self.config.image_size)} voxels, not "
                f"{tuple(pixel_values.shape[2:])}: crop or pad the volume first"
            )
        hidden_states = [] if output_hidden_states else None
        tokens = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        tokens = self.transformer(tokens, visible_tokens, hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=tokens.mean(dim=1),
            hidden_states=(*hidden_states, tokens) if output_hidden_states else None,
        )
