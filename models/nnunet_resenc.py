"""What nnssl, nnU-Net and dynamic-network-architectures call ResEnc and its tensors."""

from typing import Any

import torch
from transformers import PretrainedConfig

from .masked_resenc import unet_decoder
from .nnunet_names import NnunetNames, Weights, both_names, count

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
    names = both_names(f"{layer}.{kind}.{what}")
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
    stages = count(weights, r"encoder\.stages\.(\d+)\.")
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
        "depths": [count(weights, rf"encoder\.stages\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)],
        "strides": strides,
        "norm_eps": told.get("norm_eps", RESENC_L["norm_eps"]),
    }


RESENC = NnunetNames(
    anchor="stem.convs.0.conv.weight",
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
    root="encoder.",
    presets={"ResEncL": RESENC_L, "NoSkipResEncL": RESENC_L, "ResidualEncoderUNet": {}},
    told=_resenc_told,
    sizes=_resenc_sizes,
)
