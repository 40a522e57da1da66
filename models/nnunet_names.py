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

    anchor: str  # a tensor in each of their checkpoints, and in those of no other architecture but a later version
    tensor: Callable[[str, PretrainedConfig], list[str]]  # all names of one of ours, see `reference_names`
    network: Callable[[PretrainedConfig], dict[str, Any]]  # their class, and its numbers unless the name implies them
    released: Callable[[PretrainedConfig], dict[str, Any]] | None  # what a plan for release 2.8.1 says of the network
    keys: dict[str, Any]  # of the adaptation plan: where encoder, stem and position embedding are
    trainer: str | None  # that fine-tunes it on nnU-Net's main branch, if there is one
    decoder: Callable[[PretrainedConfig], nn.Module] | None  # of the U-Net that the release loads
    from_yxz: Callable[[Weights, PretrainedConfig, tuple[int, ...] | None], Weights] | None  # if it numbers tokens
    idle: Callable[[PretrainedConfig], Weights]  # what a network to segment holds and does not use, under their names
    scalar: str | None = None  # how names of ours end that are vectors of one, and scalars there
    built_by: Callable[[PretrainedConfig], str] | None = (
        None  # Python that builds the network in a trainer of the release,
    )
    # where none of its own loads it


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


def _primus_network(config: PretrainedConfig, version: str = "", **tokenizer: Any) -> dict[str, Any]:
    """Args: `tokenizer`, what their class must be told of it; nothing if it is the version's own."""
    if config.num_register_tokens:
        raise ValueError("nnU-Net's Primus has no register tokens: this encoder cannot be exported to it")
    for size, numbers in PRIMUS_SIZES.items():
        named = config.patch_size == [8, 8, 8] and not tokenizer
        if named and all(getattr(config, key) == n for key, n in numbers.items()):
            name = f"Primus{version}{size}"
            return {"arch_class_name": name, "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    numbers = tokenizer | {
        "embed_dim": config.hidden_size,
        "patch_embed_size": config.patch_size,
        "encoder_eva_depth": config.num_hidden_layers,
        "encoder_eva_numheads": config.num_attention_heads,
        "init_values": config.layer_scale_init,
        "scale_attn_inner": True,
    }
    return {"arch_class_name": f"Primus{version}", "arch_kwargs": numbers, "arch_kwargs_requiring_import": []}


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
)

# --------------------------------------------------------------------------- PrimusV2, PrimusV3

V2_WIDTHS = [32, 32, 64, 128]  # which their class has no argument for
V3_WIDTHS = [32, 64, 256, 1024]
TOKENIZER_NAMES = (  # ours, theirs
    (r"patch_embed\.proj\.", "down_projection.final_proj."),
    (r"patch_embed\.skips\.(\d+)\.proj\.", r"down_projection.proj_to_tokens.\1."),
    (r"patch_embed\.skips\.(\d+)\.scale", r"down_projection.scale_proj_to_tokens.\1"),
    (r"patch_embed\.stem\.skip\.", "down_projection.stem.blocks.0.skip.0."),
    (r"patch_embed\.(stages\.\d+)\.skip\.", r"down_projection.\1.blocks.0.skip.1."),  # behind the pooling
    (r"patch_embed\.(stem|stages\.\d+)\.", r"down_projection.\1.blocks.0."),
)


def _version_names(name: str, config: PretrainedConfig) -> list[str]:
    if not name.startswith("patch_embed."):
        return _primus_names(name, config)
    ours, theirs = next(pair for pair in TOKENIZER_NAMES if re.match(pair[0], name))
    return _both_names(re.sub(ours, theirs, name))


def _both_names(name: str) -> list[str]:
    """A convolution or a norm is in their blocks by its name and by its place; anything else by its name."""
    place = {"conv": 0, "norm": 1}
    by_place = re.sub(r"\.(conv|norm)\.(\w+)$", lambda found: f".all_modules.{place[found[1]]}.{found[2]}", name)
    return list(dict.fromkeys((name, by_place)))


def _v2_network(config: PretrainedConfig) -> dict[str, Any]:
    if config.embed_widths != V2_WIDTHS:
        raise ValueError(
            f"nnU-Net's PrimusV2 has embed_widths {V2_WIDTHS}: an encoder with {config.embed_widths} cannot be "
            "exported to it"
        )
    return _primus_network(config, "V2")


def _v3_network(config: PretrainedConfig) -> dict[str, Any]:
    widths = {} if config.embed_widths == V3_WIDTHS else {"ch_per_level": config.embed_widths}
    depths = {"depth_per_level": [1] * (len(config.embed_widths) - 1)} if widths else {}
    return _primus_network(config, "V3", **widths, **depths)


def _built_by(network: dict[str, Any]) -> str:
    """The call of their class, with the drop-path of their trainers."""
    name, numbers, _ = network.values()
    channels, classes, crop = "num_input_channels", "num_output_channels", "configuration_manager.patch_size"
    if numbers is None:
        return f"{name}({channels}, {classes}, (8, 8, 8), {crop}, drop_path_rate=0.2)"
    sizes = {"encoder_eva_depth": "eva_depth", "encoder_eva_numheads": "eva_numheads"}
    told = ", ".join(f"{sizes.get(key, key)}={value!r}" for key, value in numbers.items())
    return f"{name}({channels}, num_classes={classes}, input_shape={crop}, drop_path_rate=0.2, {told})"


IN_PROJ = "down_projection.stem.blocks.0.conv1."
PRIMUS_V2 = PRIMUS._replace(
    anchor=f"{IN_PROJ}conv.weight",
    tensor=_version_names,
    network=_v2_network,
    keys=PRIMUS.keys | {"keys_to_in_proj": [f"{IN_PROJ}conv", f"{IN_PROJ}all_modules.0"]},
    released=lambda config: {},  # its trainers build their networks themselves
    trainer=None,
    from_yxz=None,
    built_by=lambda config: _built_by(_v2_network(config)),
)
PRIMUS_V3 = PRIMUS_V2._replace(
    anchor="down_projection.proj_to_tokens.0.weight",
    network=_v3_network,
    scalar=".scale",
    built_by=lambda config: _built_by(_v3_network(config)),
)

# --------------------------------------------------------------------------- ResEnc

RESENC_L = {
    "hidden_sizes": [32, 64, 128, 256, 320, 320],
    "strides": [1, 2, 2, 2, 2, 2],
    "depths": [1, 3, 4, 6, 6, 6],
    "norm_eps": 1e-5,
}


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
    names = _both_names(f"{layer}.{kind}.{what}")
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


RESENC = NnunetNames(
    anchor="encoder.stem.convs.0.conv.weight",
    tensor=_resenc_names,
    network=_resenc_network,
    released=lambda config: {"architecture": _resenc_architecture(config)},
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
)
