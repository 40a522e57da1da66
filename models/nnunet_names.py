"""What nnssl, nnU-Net and dynamic-network-architectures call our networks and their tensors."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PretrainedConfig

from .configuration_primus import PRIMUS_SIZES
from .masked_resenc import unet_decoder

Weights = dict[str, torch.Tensor]


class NnunetNames(NamedTuple):
    """Of one architecture; a function takes our configuration."""

    anchor: str  # a tensor that is in each of their encoders, and in those of no other architecture
    tensor: Callable[[str, PretrainedConfig], list[str]]  # all names of one of ours, see `reference_names`
    network: Callable[[PretrainedConfig], dict[str, Any]]  # their class, and its numbers unless the name implies them
    released: Callable[[PretrainedConfig], dict[str, Any]] | None  # the same for release 2.8.1, which loads it whole
    keys: dict[str, Any]  # of the adaptation plan: where encoder, stem and position embedding are
    trainer: str  # that fine-tunes it on nnU-Net's main branch
    decoder: Callable[[PretrainedConfig], nn.Module] | None  # of the U-Net that the release loads
    from_yxz: Callable[[Weights, PretrainedConfig, tuple[int, ...] | None], Weights] | None  # if it numbers tokens
    idle: Callable[[PretrainedConfig], Weights]  # what a network to segment holds and does not use, under their names
    root: str = ""  # what stands before `anchor` in their whole network, and not in an encoder alone
    presets: dict[str, dict[str, Any]] = {}  # class that a plan names -> the numbers of ours that the name implies
    told: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # numbers of ours, out of a plan's `arch_kwargs`
    sizes: Callable[[Weights, dict[str, Any]], dict[str, Any]] | None = None  # out of tensors, and what a plan told


def _count(weights: Weights, pattern: str) -> int:
    """How many numbers stand in a place of the names."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


# --------------------------------------------------------------------------- Primus

PRIMUS_NAMES = (  # ours, theirs; the more special first
    ("patch_embed.", "down_projection.proj."),
    ("transformer.register_tokens", "register_tokens"),
    ("transformer.", "eva."),
    ("position_embedding", "pos_embed"),
    (".attention.", ".attn."),
    (".scale1", ".gamma_1"),
    (".scale2", ".gamma_2"),
    (".gate.", ".fc1_g."),
    (".up.", ".fc1_x."),
    (".down.", ".fc2."),
)


def _primus_names(name: str, config: PretrainedConfig) -> list[str]:
    if patch_decoder := re.fullmatch(r"(?:patch_)?decoder\.(\d+)\.(\w+)", name):  # of pretraining or of segmentation
        layer, what = patch_decoder.groups()
        stage, kind = divmod(int(layer), 3)  # convolution, norm, activation
        last = 2 ** (stage + 1) == max(config.patch_size)  # which is not nested
        return [f"up_projection.decode.{stage}.{what}" if last else f"up_projection.decode.{stage}.{kind}.{what}"]
    for ours, theirs in PRIMUS_NAMES:
        name = name.replace(ours, theirs)
    return [name]


def _primus_from_yxz(
    weights: dict[str, torch.Tensor], config: PretrainedConfig, image_size: tuple[int, ...] | None
) -> dict[str, torch.Tensor]:
    """Renumber the tokens of weights trained with the second axis slowest, so that the features stay the same.

    The position embedding is transposed. The rotary embedding turned the first third of each head's channels with the
    second axis and the second third with the first: these channels of queries and keys change places.
    """
    for grid in (config.image_size, image_size or config.image_size):
        if grid[0] != grid[1]:
            raise ValueError(f"tokens in the order yxz can be converted only for crops with X = Y, not {list(grid)}")
    return {name: _swap(name, tensor, config) for name, tensor in weights.items()}


def _swap(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    if name.endswith("position_embedding"):
        registers = tensor.shape[1] - math.prod(config.grid_size)
        before, tokens = tensor.tensor_split([registers], dim=1)
        tokens = tokens.unflatten(1, config.grid_size).transpose(1, 2).flatten(1, 3)
        return torch.cat((before, tokens), dim=1)
    if re.search(r"\.attention\.[qk]_proj\.", name):
        heads = config.num_attention_heads
        thirds = tensor.unflatten(0, (heads, 3, -1))
        return thirds[:, [1, 0, 2]].flatten(0, 2)
    return tensor


def _primus_network(config: PretrainedConfig) -> dict[str, Any]:
    if config.num_register_tokens:
        raise ValueError("nnU-Net's Primus has no register tokens: this encoder cannot be exported to it")
    for size, numbers in PRIMUS_SIZES.items():
        if config.patch_size == [8, 8, 8] and all(getattr(config, key) == n for key, n in numbers.items()):
            return {"arch_class_name": f"Primus{size}", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    numbers = {
        "embed_dim": config.hidden_size,
        "patch_embed_size": config.patch_size,
        "encoder_eva_depth": config.num_hidden_layers,
        "encoder_eva_numheads": config.num_attention_heads,
        "init_values": config.layer_scale_init,
        "scale_attn_inner": True,
    }
    return {"arch_class_name": "Primus", "arch_kwargs": numbers, "arch_kwargs_requiring_import": []}


def _primus_told(numbers: dict[str, Any]) -> dict[str, Any]:
    names = {
        "hidden_size": ("embed_dim",),
        "num_hidden_layers": ("encoder_eva_depth", "eva_depth"),
        "num_attention_heads": ("encoder_eva_numheads", "eva_numheads"),
        "patch_size": ("patch_embed_size",),
    }
    found = {ours: numbers[name] for ours, theirs in names.items() for name in theirs if name in numbers}
    return {name: list(n) if isinstance(n, tuple) else n for name, n in found.items()}


def _primus_sizes(weights: Weights, told: dict[str, Any]) -> dict[str, Any]:
    kernels = weights["down_projection.proj.weight"]
    size, layers = len(kernels), _count(weights, r"eva\.blocks\.(\d+)\.")
    known = [n["num_attention_heads"] for n in PRIMUS_SIZES.values() if (size, layers) == tuple(n.values())[:2]]
    heads = [told["num_attention_heads"]] if "num_attention_heads" in told else known
    if not heads:
        raise ValueError(
            f"no tensor tells how many attention heads a Primus of {layers} layers and {size} channels has, and no "
            "plan: put its adaptation_plan.json beside it"
        )
    sizes = {"hidden_size": size, "num_hidden_layers": layers, "num_attention_heads": heads[0]}
    sizes |= {"patch_size": list(kernels.shape[2:]), "num_channels": kernels.shape[1]}
    inner = weights.get("eva.blocks.0.mlp.fc1_g.weight")
    if inner is not None and len(inner) != int(size * 8 / 3):
        sizes["mlp_ratio"] = (len(inner) + 0.5) / size  # of which the whole part is taken
    if "register_tokens" in weights:
        sizes["num_register_tokens"] = weights["register_tokens"].shape[1]
    return sizes


PRIMUS = NnunetNames(
    anchor="down_projection.proj.weight",
    tensor=_primus_names,
    network=_primus_network,
    released=None,
    keys={
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ["down_projection.proj"],
        "key_to_lpe": "eva.pos_embed",
    },
    trainer="PretrainedTrainer_Primusx",
    decoder=None,
    from_yxz=_primus_from_yxz,
    idle=lambda config: {"mask_token": torch.zeros(1, 1, config.hidden_size)},
    presets={
        **{f"Primus{size}": {**numbers, "patch_size": [8, 8, 8]} for size, numbers in PRIMUS_SIZES.items()},
        **{"Primus": {}, "PrimusX": {}},
    },
    told=_primus_told,
    sizes=_primus_sizes,
)

# --------------------------------------------------------------------------- ResEnc

RESENC_L = {
    "hidden_sizes": [32, 64, 128, 256, 320, 320],
    "strides": [1, 2, 2, 2, 2, 2],
    "depths": [1, 3, 4, 6, 6, 6],
    "norm_eps": 1e-5,
}


RESENC_LAYERS = {"conv_op": "Conv3d", "norm_op": "InstanceNorm3d", "nonlin": "LeakyReLU"}


def _resenc_names(name: str, config: PretrainedConfig) -> list[str]:
    parts = name.split(".")
    if name.startswith("decoder.upsample."):
        return [name.replace("upsample", "transpconvs")]
    if name.startswith("decoder.output."):
        return [f"decoder.seg_layers.{len(config.depths) - 2}.{parts[-1]}"]
    kind, what = parts[-2:]  # conv or norm; weight or bias
    if parts[0] == "stem":
        layer = "encoder.stem.convs.0"
    elif parts[0] == "decoder":
        layer = f"decoder.stages.{parts[2]}.convs.0"
    else:
        _, stage, block, branch = parts[:4]
        if branch == "skip":  # behind the average pooling, where there is one
            branch = f"skip.{int(config.strides[int(stage)] > 1 and block == '0')}"
        layer = f"encoder.stages.{stage}.blocks.{block}.{branch}"
    names = [f"{layer}.{kind}.{what}", f"{layer}.all_modules.{('conv', 'norm').index(kind)}.{what}"]
    return names if parts[0] == "decoder" else names + [f"decoder.{n}" for n in names]


def _resenc_network(config: PretrainedConfig) -> dict[str, Any]:
    if all(getattr(config, key) == value for key, value in RESENC_L.items()):
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    name, numbers, imported = _resenc_architecture(config).values()
    return {"arch_class_name": name, "arch_kwargs": numbers, "arch_kwargs_requiring_import": imported}


def _resenc_architecture(config: PretrainedConfig) -> dict[str, Any]:
    stages = len(config.depths)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": config.hidden_sizes,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[stride] * 3 for stride in config.strides],
            "n_blocks_per_stage": config.depths,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": config.norm_eps, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _layers_of_deep_supervision(config: PretrainedConfig) -> Weights:
    """nnU-Net builds these for all decoder stages; the finest one alone gives the segmentation."""
    layers = {}
    for stage, channels in enumerate(config.hidden_sizes[-2:0:-1]):
        name = f"decoder.seg_layers.{stage}"
        layers[f"{name}.weight"] = torch.zeros(config.num_labels, channels, 1, 1, 1)
        layers[f"{name}.bias"] = torch.zeros(config.num_labels)
    return layers


def _resenc_told(numbers: dict[str, Any]) -> dict[str, Any]:
    names = {"hidden_sizes": "features_per_stage", "depths": "n_blocks_per_stage", "strides": "strides"}
    found = {ours: list(numbers[theirs]) for ours, theirs in names.items() if theirs in numbers}
    if "strides" in found:
        along = [{*stride} if isinstance(stride, (list, tuple)) else {stride} for stride in found["strides"]]
        if any(len(values) > 1 for values in along):
            raise ValueError(
                f"its plan has strides {found['strides']}, which differ between axes: our ResEnc has one a stage, and "
                "cannot be this network"
            )
        found["strides"] = [values.pop() for values in along]
    for key, ours in RESENC_LAYERS.items():  # which no tensor tells
        if not (numbers.get(key) or ours).endswith(ours):
            raise ValueError(f"its plan has {key}={numbers[key]}, our ResEnc {ours}: it cannot be this network")
    slope = (numbers.get("nonlin_kwargs") or {}).get("negative_slope", 0.01)
    if slope != 0.01:
        raise ValueError(f"its plan has a LeakyReLU of slope {slope}, our ResEnc of 0.01: it cannot be this network")
    eps = (numbers.get("norm_op_kwargs") or {}).get("eps")
    return found | ({} if eps is None else {"norm_eps": 1.0 * eps})


def _resenc_sizes(weights: Weights, told: dict[str, Any]) -> dict[str, Any]:
    """A stage that changes its channels shows whether it has a stride; the rest is as nnU-Net has it: 1, 2, 2, ..."""
    first = "encoder.stages.{}.blocks.0.conv1.conv.weight"
    stages = _count(weights, r"encoder\.stages\.(\d+)\.")
    if missing := [first.format(n) for n in range(max(stages, 1)) if first.format(n) not in weights]:
        raise ValueError(f"{missing[0]} is missing: it is no residual encoder, or not a whole one")
    strides = list(told.get("strides") or [1, *[2] * (stages - 1)])
    for stage in range(min(stages, len(strides))):
        skip = f"encoder.stages.{stage}.blocks.0.skip"
        if f"{skip}.0.conv.weight" in weights:
            strides[stage] = 1
        elif f"{skip}.1.conv.weight" in weights and strides[stage] == 1:  # behind the average pooling
            strides[stage] = 2
    return {
        "num_channels": weights["encoder.stem.convs.0.conv.weight"].shape[1],
        "hidden_sizes": [len(weights[first.format(stage)]) for stage in range(stages)],
        "depths": [_count(weights, rf"encoder\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "strides": strides,
        "norm_eps": told.get("norm_eps", RESENC_L["norm_eps"]),
    }


RESENC = NnunetNames(
    anchor="stem.convs.0.conv.weight",
    tensor=_resenc_names,
    network=_resenc_network,
    released=_resenc_architecture,
    keys={
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    },
    trainer="PretrainedTrainer",
    decoder=unet_decoder,
    from_yxz=None,
    idle=_layers_of_deep_supervision,
    root="encoder.",
    presets={"ResEncL": RESENC_L, "NoSkipResEncL": RESENC_L, "ResidualEncoderUNet": {}},
    told=_resenc_told,
    sizes=_resenc_sizes,
)
