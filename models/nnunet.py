"""An encoder as nnU-Net reads it: one checkpoint for both of its loaders, and a plan for each.

nnU-Net's fine-tuning path builds the network that the adaptation plan names and loads encoder and stem, strictly, by
the plan's keys. Its older `-pretrained_weights` demands every tensor of the network but the segmentation layers, so
that `released_plans` must make it build this very network.
"""

import re
import warnings

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .architectures import architecture, names_in_nnunet
from .conversion import to_reference

CONFIGURATION = "pretrained"  # of released nnU-Net, beside its 2d and 3d_fullres


def adaptation_plan(config: PretrainedConfig, name: str) -> dict:
    """What nnU-Net needs to know to build the network and to find the encoder in the checkpoint.

    Args:
        config: of the encoder; its `preprocessing` gives spacing and crop.
        name: of the pretraining, for nnU-Net's own records.

    Raises:
        ValueError: if nnU-Net has no such network.
    """
    names = names_in_nnunet(config.model_type)
    spacing, patch_size = config.preprocessing["spacing"], list(config.image_size)
    if spacing == "native":
        spacing = None  # nnU-Net then takes the data set's, or with `-am no_resample` each volume's own
    elif len(set(spacing)) > 1 and config.preprocessing["orientation"][0] not in "SI":
        warnings.warn(
            f"nnU-Net reads volumes as [Z, Y, X], and will take the spacing {spacing} in that order, not in that of "
            f"{config.preprocessing['orientation']}: choose its spacing by hand there",
            stacklevel=2,
        )
    for words in (normalises_otherwise(config), turns_otherwise(config)):
        if words:
            warnings.warn(words, stacklevel=2)
    style = "noresample" if spacing is None else "onemmiso" if spacing == [1.0, 1.0, 1.0] else "fixed"
    resampling = {"order_z": 1, "force_separate_z": None}
    configuration = {
        "data_identifier": name,
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": style,
        "normalization_schemes": [_normalization(config)] * config.num_channels,
        "use_mask_for_norm": [False] * config.num_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, **resampling},
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": {"is_seg": True, "order": 1, **resampling},
        "spacing": spacing,
        "patch_size": patch_size,
    }
    return {
        "architecture_plans": names.network(config),
        "pretrain_plan": {
            "dataset_name": name,
            "plans_name": name,
            "original_median_spacing_after_transp": spacing,
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {style: configuration},
            "experiment_planner_used": "FixedResEncUNetPlanner",
        },
        "pretrain_num_input_channels": config.num_channels,
        "recommended_downstream_patchsize": patch_size,
        **names.keys,
    }


def released_plans(config: PretrainedConfig) -> dict | None:
    """A plans file for release 2.8.1, to be completed for a data set by its planner; None if it loads no such network.

    The planner keeps configurations of other names than its own in a file that it finds. This one, `CONFIGURATION`, is
    the encoder's network, crop, spacing and normalisation, on top of what the planner finds for "3d_fullres".
    """
    of_network = names_in_nnunet(config.model_type).released
    if of_network is None:
        return None
    spacing, normalization = config.preprocessing["spacing"], _normalization(config)
    native = spacing == "native"
    spelled = "native" if native else "_".join(f"{s:g}" for s in spacing)
    configuration = {
        "inherits_from": "3d_fullres",
        "data_identifier": f"{CONFIGURATION}_{spelled}_{normalization}",  # the folder of what is prepared in this way
        "batch_size": 2,  # the least that it plans
        "patch_size": list(config.image_size),
        "normalization_schemes": [normalization] * config.num_channels,
        "use_mask_for_norm": [False] * config.num_channels,
        **of_network(config),
    }
    return {"configurations": {CONFIGURATION: configuration | ({} if native else {"spacing": spacing})}}


def normalises_otherwise(config: PretrainedConfig) -> str | None:
    """What to say where nnU-Net does not bring intensities to the scale that the encoder was trained on."""
    steps = config.preprocessing
    rules = [rule["rule"] for rule in (steps.get("intensity"), steps.get("intensity_of_ct")) if rule]
    if {*rules} <= {"box"}:
        return None
    theirs = "its path for pretrained encoders z-scores every volume, whatever a plan says"
    if _normalization(config) == "CTNormalization":
        theirs += "; CTNormalization, the nearest that it has, clips to percentiles of the data set's foreground and "
        theirs += "scales by its mean and standard deviation, not by fixed numbers"
    return f"nnU-Net normalises otherwise than this encoder was trained with ({steps['normalisation']}): {theirs}"


def turns_otherwise(config: PretrainedConfig) -> str | None:
    """What to say where crops of the pretraining have their volume's coarsest axis last."""
    if not config.preprocessing.get("coarsest_last"):
        return None
    return (
        "this encoder was trained on crops whose last axis is the volume's coarsest; nnU-Net moves that of a data set "
        "first (transpose_forward), and leaves others as they are"
    )


def _normalization(config: PretrainedConfig) -> str:
    """The nearest that nnU-Net has."""
    rule = (config.preprocessing.get("intensity") or {}).get("rule")
    return "CTNormalization" if rule == "window" else "ZScoreNormalization"


def fresh_decoder(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The weights of a U-Net decoder, initialised as nnU-Net does, the same each time; none if it has no decoder."""
    build = names_in_nnunet(config.model_type).decoder
    if build is None:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).state_dict()


def checkpoint(
    encoder: PreTrainedModel, decoder: dict[str, torch.Tensor] | None, name: str, method: dict[str, str]
) -> dict:
    """The content of `checkpoint_final.pth`: tensors and plain values only, for `torch.load(weights_only=True)`.

    Args:
        decoder: the pretraining's U-Net decoder, if nnU-Net's network has one; None gives a `fresh_decoder`.
        name: of the pretraining.
        method: `name` and `citation` of what it was trained with; empty if that is not known.
    """
    config, row = encoder.config, architecture(encoder.config.model_type)
    weights = {n: w.detach().cpu().contiguous() for n, w in encoder.state_dict().items()}
    decoder = fresh_decoder(config) if decoder is None else decoder
    weights |= {f"decoder.{n}": w.cpu().contiguous() for n, w in sorted(decoder.items())}  # the same bytes each time
    citations = [{"type": "Architecture", "name": row.name, "apa_citations": [row.paper]}]
    if "citation" in method:
        citations.insert(0, {"type": "Method", "name": method["name"] or name, "apa_citations": [method["citation"]]})
    return {
        "network_weights": to_reference(weights, config),
        "nnssl_adaptation_plan": adaptation_plan(config, name),
        "citations": citations,
        "trainer_name": re.sub(r"\W+", "", method.get("name") or name),
        "token_order": "xyz",  # for `load_pretrained`
    }
