"""How weights of others look; the reference networks write them."""

import json

import torch
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from test_nnunet import RESENC_L
from test_reference import randomise, reference_resenc
from torch import nn
from transformers import AutoModel

import publish as script

RESENC = {"hidden_sizes": [4, 8, 8], "strides": [1, 2, 2], "depths": [1, 2, 2]}  # as resenc_student has it
BY_HAND = ["--spacing", "1", "1", "1.5", "--orientation", "RAS", "--intensity", "box", "--crop-size", "16", "16", "24"]


def encoder_alone(channels=1, sizes=RESENC):
    return randomise(
        ResidualEncoder(
            channels,
            len(sizes["depths"]),
            sizes["hidden_sizes"],
            nn.Conv3d,
            3,
            sizes["strides"],
            sizes["depths"],
            True,
            nn.InstanceNorm3d,
            {"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            return_skips=True,
        )
    )


def resenc_arguments(sizes=RESENC):
    """As nnssl and nnU-Net write them into plans."""
    stages = len(sizes["depths"])
    return RESENC_L | {
        "n_stages": stages,
        "features_per_stage": sizes["hidden_sizes"],
        "kernel_sizes": [[3, 3, 3]] * stages,
        "strides": [[stride] * 3 for stride in sizes["strides"]],
        "n_blocks_per_stage": sizes["depths"],
        "n_conv_per_stage_decoder": [1] * (stages - 1),
    }


PRIMUS_ARGUMENTS = {
    "input_channels": 1,
    "embed_dim": 48,
    "patch_embed_size": (8, 8, 8),
    "input_shape": (24, 24, 16),
    "encoder_eva_depth": 2,
    "encoder_eva_numheads": 2,
    "init_values": 0.1,
    "scale_attn_inner": True,
}


def plan(network, arguments=None, patch_size=(16, 16, 16), **changes):
    """An adaptation plan with the keys of MIC-DKFZ/nnssl, src/nnssl/adaptation_planning/adaptation_plan.py."""
    preparation = {"spacing": None, "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
    preparation |= {"spacing_style": "noresample", "patch_size": list(patch_size)}
    preparation |= {key: changes.pop(key) for key in [*changes] if key in preparation}
    primus = network.startswith("Primus")
    return {
        "architecture_plans": {"arch_class_name": network, "arch_kwargs": arguments},
        "pretrain_plan": {
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": changes.pop("transpose_forward", [0, 1, 2]),
            "configurations": {"noresample": preparation},
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [32, 32, 32],
        "key_to_encoder": "eva" if primus else "encoder.stages",
        "key_to_stem": "down_projection" if primus else "encoder.stem",
        "keys_to_in_proj": ["down_projection.proj" if primus else "encoder.stem.convs.0.conv"],
        "key_to_lpe": "eva.pos_embed" if primus else None,
        **changes,
    }


def released(folder, network, a_plan, beside=False, **content):
    """As the models of MIC-DKFZ lie on the Hub, config.json included."""
    folder.mkdir(exist_ok=True)
    content |= {"network_weights": network.state_dict()} | ({} if beside else {"nnssl_adaptation_plan": a_plan})
    torch.save(content, folder / "checkpoint_final.pth")
    (folder / "config.json").write_text('{"library": "nnunetv2"}')
    if beside:
        (folder / "adaptation_plan.json").write_text(json.dumps(a_plan))
    return folder


def publish(source, folder, *arguments, license="cc-by-sa-4.0"):
    words = [source, "--to", folder, *(["--license", license] if license else []), *arguments]
    script.main(script.parse_arguments([str(word) for word in words]))
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def released_resenc(folder):
    """A network and the folder that it was released as."""
    network = reference_resenc(1, RESENC, classes=1)
    a_plan = plan("ResidualEncoderUNet", resenc_arguments())
    citations = [{"type": "Method", "name": "MAE", "apa_citations": ["Doe, J. (2026). A\n  method."]}]
    return network, released(folder, network, a_plan, citations=citations)
