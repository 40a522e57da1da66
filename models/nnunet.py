"""An encoder as nnU-Net reads it: one checkpoint for both of its loaders, and the adaptation plan inside it.

nnU-Net's fine-tuning path builds the network that the plan names and loads encoder and stem, strictly, by the plan's
keys. Its older `-pretrained_weights` demands every tensor of the network but the segmentation layers.
"""

import warnings

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .configuration_primus import PRIMUS_SIZES
from .conversion import to_reference
from .masked_resenc import UNetDecoder

RESENC_L = {
    "hidden_sizes": [32, 64, 128, 256, 320, 320],
    "strides": [1, 2, 2, 2, 2, 2],
    "depths": [1, 3, 4, 6, 6, 6],
    "norm_eps": 1e-5,
}
CITATIONS = [
    {"type": "Method", "name": "Consistent View Alignment", "apa_citations": ["arXiv:2509.13846"]},
    {"type": "Architecture", "name": "Primus", "apa_citations": ["Wald et al. (2025). arXiv:2503.01835"]},
    {"type": "Architecture", "name": "ResEnc", "apa_citations": ["Isensee et al. (2024). arXiv:2404.09556"]},
]


def adaptation_plan(config: PretrainedConfig, name: str) -> dict:
    """What nnU-Net needs to know to build the network and to find the encoder in the checkpoint.

    Args:
        config: of the encoder; its `preprocessing` gives spacing and crop.
        name: of the pretraining, for nnU-Net's own records.

    Raises:
        ValueError: if nnU-Net has no such network.
    """
    spacing, patch_size = config.preprocessing["spacing"], list(config.image_size)
    if len(set(spacing)) > 1 and config.preprocessing["orientation"][0] not in "SI":
        warnings.warn(
            f"nnU-Net reads volumes as [Z, Y, X], and will take the spacing {spacing} in that order, not in that of "
            f"{config.preprocessing['orientation']}: choose its spacing by hand there",
            stacklevel=2,
        )
    isotropic = spacing == [1.0, 1.0, 1.0]
    resampling = {"order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"cva_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "onemmiso" if isotropic else "fixed",
        "normalization_schemes": ["ZScoreNormalization"] * config.num_channels,
        "use_mask_for_norm": [False] * config.num_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, **resampling},
        "spacing": spacing,
        "patch_size": patch_size,
    }
    return {
        "architecture_plans": _architecture(config),
        "pretrain_plan": {
            "dataset_name": name,
            "plans_name": f"cva_{name}",
            "original_median_spacing_after_transp": spacing,
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {"onemmiso" if isotropic else "fixed": configuration},
            "experiment_planner_used": "FixedResEncUNetPlanner",
        },
        "pretrain_num_input_channels": config.num_channels,
        "recommended_downstream_patchsize": patch_size,
        **(PRIMUS_KEYS if config.model_type == "primus" else RESENC_KEYS),
    }


PRIMUS_KEYS = {
    "key_to_encoder": "eva",
    "key_to_stem": "down_projection",
    "keys_to_in_proj": ["down_projection.proj"],
    "key_to_lpe": "eva.pos_embed",
}
RESENC_KEYS = {
    "key_to_encoder": "encoder.stages",
    "key_to_stem": "encoder.stem",
    "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
    "key_to_lpe": None,
}


def _architecture(config: PretrainedConfig) -> dict:
    """The network's name; its numbers too unless the name implies them."""
    if config.model_type == "primus":
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
    if all(getattr(config, key) == value for key, value in RESENC_L.items()):
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    stages = len(config.depths)
    numbers = {
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
    }
    imported = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    return {"arch_class_name": name, "arch_kwargs": numbers, "arch_kwargs_requiring_import": imported}


def unet_decoder(config: PretrainedConfig) -> UNetDecoder:
    """A U-Net decoder for a ResEnc, initialised as nnU-Net does, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNetDecoder(config.hidden_sizes, config.strides, config.num_channels, config.norm_eps)


def checkpoint(encoder: PreTrainedModel, decoder: dict[str, torch.Tensor] | None, name: str) -> dict:
    """The content of `checkpoint_final.pth`: tensors and plain values only, for `torch.load(weights_only=True)`.

    Args:
        decoder: the pretraining's U-Net decoder, for a ResEnc: names as in `UNetDecoder`'s state dict; None gives one
            as nnU-Net would initialise it, the same each time.
        name: of the pretraining.
    """
    config = encoder.config
    weights = {n: w.detach().cpu().contiguous() for n, w in encoder.state_dict().items()}
    if config.model_type == "resenc":
        if decoder is None:
            decoder = unet_decoder(config).state_dict()
        weights |= {
            f"decoder.{n}": w.cpu().contiguous() for n, w in sorted(decoder.items())
        }  # the same bytes each time
    other = "ResEnc" if config.model_type == "primus" else "Primus"
    return {
        "network_weights": to_reference(weights, config),
        "nnssl_adaptation_plan": adaptation_plan(config, name),
        "citations": [citation for citation in CITATIONS if citation["name"] != other],
        "trainer_name": "ConsistentViewAlignment",
    }
