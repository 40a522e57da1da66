"""Primus: a plain 3D vision transformer with EVA-02 blocks (Wald et al. 2025, arXiv 2503.01835).

Needs torch and transformers only: this file and its configuration are copied next to the weights.
Tokens are numbered with X slowest and Z fastest, the order of `[B, C, X, Y, Z].flatten(2)`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_primus import PrimusConfig
from .modeling_encoder import Encoder, EncoderOutput


def rotary_turns(grid_size, head_size, theta, like, num_register_tokens=0):
    """The axial 3D rotary embedding: a cosine and a sine a token and channel pair, `[R + N, head_size / 2, 2]`.

    A third of the channel pairs turns with each axis, at `head_size / 6` frequencies from 1 down to 1 / theta.
    Positions count tokens, so a crop of another size keeps its distances. Register tokens come first and are not
    turned. float32, or float64 if `like` is; on the device of `like`.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    bands = head_size // 6
    frequencies = theta ** (-torch.arange(bands, device=like.device, dtype=dtype) / bands)
    axes = [torch.arange(n, device=like.device, dtype=dtype) for n in grid_size]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [x, y, z, 3]
    angles = (positions[..., None] * frequencies).reshape(-1, 3 * bands)
    angles = F.pad(angles, (0, 0, num_register_tokens, 0))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(heads, turns):
    """Turn neighbouring channel pairs of `[B, heads, tokens, head_size]` by `rotary_turns`."""
    pairs = heads.to(turns.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # it knows no complex numbers, and makes one pass of this, several of a stack
        cos, sin = turns[..., :1], turns[..., 1:]
        turned = pairs * cos + pairs.flip(-1) * torch.cat((-sin, sin), dim=-1)
    else:  # the same in one pass over the memory
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(-2).to(heads.dtype)


def eager_attention_forward(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """Attention spelled out: `[B, heads, N, head_size]` -> `[B, N, heads, head_size]` and its weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class InputNorm(nn.LayerNorm):
    """LayerNorm whose output is in the precision of autocast: cast once here, not again by each layer that reads it.

    It computes in float32 and keeps its input as it came; on a GPU autocast would make, and keep, a float32 copy.
    """

    def forward(self, x):
        device = x.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no meta tensors
            return super().forward(x)
        with torch.autocast(device, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            normed = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return normed.to(torch.get_autocast_dtype(device))


class PrimusAttention(nn.Module):
    """Self-attention with rotary positions, no key bias, and a LayerNorm before the output projection."""

    is_causal = False

    def __init__(self, config, num_heads, output_std):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.num_heads = num_heads
        self.scaling = (size // num_heads) ** -0.5
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size)
        self.norm = InputNorm(size, eps=config.layer_norm_eps)
        self.proj = nn.Linear(size, size)
        self.proj.init_std = output_std

    def forward(self, x, turns):
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.proj(self.norm(self.attend(q, k, v, turns)))

    def attend(self, q, k, v, turns):
        """Queries, keys and values `[B, heads, N, head_size]` -> tokens `[B, N, C]`."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        x, _ = attend(self, rotate(q, turns), rotate(k, turns), v, None, scaling=self.scaling, dropout=0.0)
        return x.flatten(2)


class PrimusMLP(nn.Module):
    """SwiGLU with a LayerNorm on the hidden layer."""

    def __init__(self, config, output_std):
        super().__init__()
        size = config.hidden_size
        inner = int(size * config.mlp_ratio)
        self.gate = nn.Linear(size, inner)
        self.up = nn.Linear(size, inner)
        self.norm = InputNorm(inner, eps=config.layer_norm_eps)
        self.down = nn.Linear(inner, size)
        self.down.init_std = output_std

    def forward(self, x):
        return self.down(self.norm(F.silu(self.gate(x)) * self.up(x)))


class PrimusBlock(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each with LayerScale and, in training, DropPath."""

    def __init__(self, config, num_heads, layer):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        output_std = config.initializer_range / math.sqrt(2 * (layer + 1))  # deeper layers start smaller, as in BEiT
        self.norm1 = InputNorm(size, eps=eps)
        self.attention = PrimusAttention(config, num_heads, output_std)
        self.scale1 = nn.Parameter(torch.full((size,), config.layer_scale_init))
        self.norm2 = InputNorm(size, eps=eps)
        self.mlp = PrimusMLP(config, output_std)
        self.scale2 = nn.Parameter(torch.full((size,), config.layer_scale_init))
        self.layer_scale_init = config.layer_scale_init

    def forward(self, x, turns, kept=None):
        """Tokens `[B, N, C]`, `rotary_turns`, and of both branches what `drop_paths` draws."""
        scale1, scale2 = (self.scale1, self.scale2) if kept is None else (self.scale1 * kept[0], self.scale2 * kept[1])
        x = x + scale1 * self.attention(self.norm1(x), turns)
        return x + scale2 * self.mlp(self.norm2(x))


def drop_paths(rate, x):
    """For the two branches of a block `[B, 1, 1]` each: 0 for the samples of `x` that drop it, more for the others."""
    branches = x.new_ones(2, x.shape[0], 1, 1)
    return [branch.bernoulli_(1.0 - rate).div_(1.0 - rate) if rate else branch for branch in branches]


class PrimusTransformer(nn.Module):
    """Position embedding, blocks and final norm: the encoder's trunk, and the shape of the pretraining decoders."""

    def __init__(self, config, num_layers, num_heads, drop_path_rate=0.0, num_register_tokens=0):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.num_register_tokens = num_register_tokens
        size, tokens = config.hidden_size, num_register_tokens + math.prod(config.grid_size)
        self.position_embedding = nn.Parameter(torch.zeros(tokens, size))  # FSDP2 cuts the first axis
        self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, size)) if num_register_tokens else None
        self.drop_path_rates = [drop_path_rate * i / max(num_layers - 1, 1) for i in range(num_layers)]
        self.blocks = nn.ModuleList(PrimusBlock(config, num_heads, i) for i in range(num_layers))
        self.norm = InputNorm(size, eps=config.layer_norm_eps)

    def positions(self, grid_size):
        """The position embedding `[R + N, C]` of a grid, trilinearly resized unless it is the pretraining grid."""
        if tuple(grid_size) == self.config.grid_size:
            return self.position_embedding
        registers, tokens = self.position_embedding.tensor_split([self.num_register_tokens])
        tokens = tokens.T.unflatten(1, self.config.grid_size)[None]
        tokens = F.interpolate(tokens, size=tuple(grid_size), mode="trilinear", align_corners=False)
        return torch.cat((registers, tokens[0].flatten(1).T))

    def forward(self, tokens, grid_size, visible_tokens=None, hidden_states=None, num_layers=None):
        """Tokens `[B, N, C]` of a grid of `grid_size` -> `[B, N, C]`.

        Args:
            visible_tokens: `[B, K]`, the numbers of the tokens to keep; the result is `[B, K, C]` then.
            hidden_states: a list, to which what each layer receives is appended.
            num_layers: stop after so many layers, without the final norm if these are not all.
        """
        registers = self.num_register_tokens
        if registers:
            tokens = torch.cat((self.register_tokens.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        tokens = tokens + self.positions(grid_size)
        head_size = self.config.hidden_size // self.num_heads
        turns = rotary_turns(grid_size, head_size, self.config.rope_theta, tokens, registers)
        if visible_tokens is not None:
            kept = F.pad(visible_tokens + registers, (registers, 0))
            kept[:, :registers] = torch.arange(registers, device=kept.device)
            tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
            turns = turns[kept][:, None]  # [B, 1, R + K, head_size / 2, 2]
        drops = self.training and any(self.drop_path_rates)
        for block, rate in zip(self.blocks[:num_layers], self.drop_path_rates):
            if hidden_states is not None:
                hidden_states.append(tokens[:, registers:])
            # drawn outside of the blocks, which are then one graph to torch.compile whatever their rates
            tokens = block(tokens, turns, drop_paths(rate, tokens) if drops else None)
        if num_layers is None or num_layers == len(self.blocks):
            tokens = self.norm(tokens)
        return tokens[:, registers:]


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
    elif isinstance(module, (nn.LayerNorm, nn.InstanceNorm3d)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PrimusBlock):
        nn.init.constant_(module.scale1, module.layer_scale_init)
        nn.init.constant_(module.scale2, module.layer_scale_init)
    elif isinstance(module, PrimusTransformer):
        nn.init.trunc_normal_(module.position_embedding, std=std)
        if module.register_tokens is not None:
            nn.init.normal_(module.register_tokens, std=1e-6)


class PrimusModel(Encoder):
    """The Primus encoder: crop -> tokens.

    Args:
        config: the sizes, see `PrimusConfig`.
    """

    config_class = PrimusConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules = ["PrimusBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.patch_embed = self.tokenizer(config)
        self.transformer = PrimusTransformer(
            config,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.drop_path_rate,
            config.num_register_tokens,
        )
        self.post_init()

    @staticmethod
    def tokenizer(config):
        """What makes a map of tokens `[B, hidden_size, x, y, z]` of crops."""
        return nn.Conv3d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)

    def _init_weights(self, module):
        init_primus_weights(module, self.config.initializer_range)

    def get_input_embeddings(self):
        return self.patch_embed

    def embed(self, pixel_values, visible_tokens=None, masked_tokens=None):
        """The tokenizer's map; of visible tokens it tells nothing of what lies in hidden ones (see `forward`)."""
        return self.patch_embed(pixel_values)  # each token of its own voxels

    @can_return_tuple
    def forward(
        self,
        pixel_values,
        visible_tokens=None,
        output_hidden_states=None,
        stages=None,
        masked_tokens=None,
        mask_embedding=None,
    ):
        """Encode crops `[B, C, X, Y, Z]`, prepared as preprocessor_config.json says.

        The crops have any size that `config.patch_size` divides; for another than `config.image_size` the position
        embedding is resized. Register tokens, if the encoder has any, are not returned.

        Args:
            visible_tokens: `[B, K]` integer, the token numbers to keep (masked pretraining); all tokens if None.
            output_hidden_states: also return what each layer received and the last output.
            stages: names out of `config.stage_names`; their feature maps are returned by name, and nothing deeper than
                the deepest of them is computed.
            masked_tokens, mask_embedding: `[B, x, y, z]`, True for tokens in whose place a learned embedding
                `[hidden_size]` enters the transformer (masked pretraining that encodes all tokens, SimMIM).

        Returns:
            `last_hidden_state` `[B, N or K, hidden_size]` and `pooler_output` `[B, hidden_size]`, its mean (both None
            if `stages` ends before the last); `hidden_states`, a tuple of such token tensors, or None; `feature_maps`,
            name -> `[B, hidden_size, x, y, z]`, or None.

        Raises:
            ValueError: if the channels or the size of the crops do not fit, or a stage does not exist.
        """
        self._check_crop(pixel_values, self.config.patch_size)
        deepest, names = self._deepest(stages), self.config.stage_names
        if stages is not None and visible_tokens is not None:
            raise ValueError("feature maps need all tokens: give either stages or visible_tokens")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        embedded = self.embed(pixel_values, visible_tokens, masked_tokens)
        grid_size = embedded.shape[2:]
        states = [] if output_hidden_states or stages is not None else None
        tokens = embedded.flatten(2).transpose(1, 2)
        if masked_tokens is not None:
            tokens = torch.where(masked_tokens.flatten(1)[..., None], mask_embedding.to(tokens.dtype), tokens)
        tokens = self.transformer(tokens, grid_size, visible_tokens, states, deepest)
        if states is not None:
            states.append(tokens)
        ended = deepest == self.config.num_hidden_layers
        maps = None
        if stages is not None:
            maps = {name: states[names.index(name)].transpose(1, 2).unflatten(2, grid_size) for name in stages}
        return EncoderOutput(
            last_hidden_state=tokens if ended else None,
            pooler_output=tokens.mean(dim=1) if ended else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            feature_maps=maps,
        )
