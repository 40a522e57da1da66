"""What nnssl, nnU-Net and dynamic-network-architectures call Primus, PrimusV2, PrimusV3 and their tensors."""

import math
import re
from typing import Any

import torch
from transformers import PretrainedConfig

from .configuration_primus import PRIMUS_SIZES
from .nnunet_names import NnunetNames, Weights, both_names, count

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
        before, tokens = tensor.tensor_split([len(tensor) - math.prod(config.grid_size)])
        return torch.cat((before, tokens.unflatten(0, config.grid_size).transpose(0, 1).flatten(0, 2)))
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
    of_tokens = {"patch_size": list(kernels.shape[2:]), "num_channels": kernels.shape[1]}
    return _transformer_sizes(weights, told, len(kernels)) | of_tokens


def _transformer_sizes(weights: Weights, told: dict[str, Any], size: int) -> dict[str, Any]:
    layers = count(weights, r"eva\.blocks\.(\d+)\.")
    known = [n["num_attention_heads"] for n in PRIMUS_SIZES.values() if (size, layers) == tuple(n.values())[:2]]
    heads = [told["num_attention_heads"]] if "num_attention_heads" in told else known
    if not heads:
        raise ValueError(
            f"no tensor tells how many attention heads a Primus of {layers} layers and {size} channels has, and no "
            "plan: put its adaptation_plan.json beside it"
        )
    sizes = {"hidden_size": size, "num_hidden_layers": layers, "num_attention_heads": heads[0]}
    inner = weights.get("eva.blocks.0.mlp.fc1_g.weight")
    if inner is not None and len(inner) != int(size * 8 / 3):
        sizes["mlp_ratio"] = (len(inner) + 0.5) / size  # of which the whole part is taken
    if "register_tokens" in weights:
        sizes["num_register_tokens"] = weights["register_tokens"].shape[1]
    return sizes


def _primus_presets(version: str = "", **tokenizer: Any) -> dict[str, dict[str, Any]]:
    """The named sizes, and the class that is told its own."""
    sizes = {
        f"Primus{version}{size}": {**numbers, "patch_size": [8, 8, 8], **tokenizer}
        for size, numbers in PRIMUS_SIZES.items()
    }
    return sizes | {f"Primus{version}": {}}


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
    presets={**_primus_presets(), "PrimusX": {}},
    told=_primus_told,
    sizes=_primus_sizes,
    shapes={"position_embedding": lambda tensor: tensor[None]},
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
    return both_names(re.sub(ours, theirs, name))


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


def _version_told(numbers: dict[str, Any]) -> dict[str, Any]:
    widths = numbers.get("ch_per_level")
    return _primus_told(numbers) | ({} if widths is None else {"embed_widths": list(widths)})


def _version_sizes(weights: Weights, told: dict[str, Any]) -> dict[str, Any]:
    stem, first = weights[f"{IN_PROJ}conv.weight"], "down_projection.stages.{}.blocks.0.conv1.conv.weight"
    stages = count(weights, r"down_projection\.stages\.(\d+)\.")
    of_tokens = {
        "embed_widths": [len(stem), *(len(weights[first.format(stage)]) for stage in range(stages))],
        "patch_size": [2**stages] * 3,
        "num_channels": stem.shape[1],
    }
    return _transformer_sizes(weights, told, len(weights["down_projection.final_proj.weight"])) | of_tokens


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
    presets=_primus_presets("V2", embed_widths=V2_WIDTHS),
    told=_version_told,
    sizes=_version_sizes,
)
PRIMUS_V3 = PRIMUS_V2._replace(
    anchor="down_projection.proj_to_tokens.0.weight",
    network=_v3_network,
    shapes=PRIMUS.shapes | {".scale": lambda tensor: tensor.reshape(())},
    built_by=lambda config: _built_by(_v3_network(config)),
    presets=_primus_presets("V3", embed_widths=V3_WIDTHS),
)
