"""The checkpoint in the hands of nnU-Net: its released loader, and the adaptation plan followed to the letter."""

import json
import os
import pydoc
import re
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import BIN, blobs, save_nifti
from dynamic_network_architectures.architectures.primus import PrimusB, PrimusL, PrimusM, PrimusS
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_reference import difference, tokens_of

from benchmarks import inference
from models import PRIMUS_SIZES, PrimusConfig, PrimusModel, ResEncConfig, ResEncModel, architecture
from models.architectures import segmentation_class
from models.masked_resenc import MaskedResEnc
from models.nnunet import CONFIGURATION, adaptation_plan, checkpoint, released_plans
from models.warm_start import load_pretrained
from training.model_card import model_card, nnunet_section
from training.student import preprocessing

PRIMUS = {"PrimusS": PrimusS, "PrimusB": PrimusB, "PrimusM": PrimusM, "PrimusL": PrimusL}
RESENC_L = {  # what nnU-Net's main branch builds for the name, and its ResEnc-L planner for large isotropic volumes
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5,
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
TINY_RESENC = {"hidden_sizes": [4, 8, 12], "strides": [1, 2, 2], "depths": [1, 2, 2]}
TINY_PRIMUS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def encoder_of(config_class, model_class, crop_size, **sizes):
    torch.manual_seed(0)
    prepared_as = preprocessing("RAS", (1.0, 1.0, 1.0), crop_size)
    return model_class(config_class(image_size=crop_size, preprocessing=prepared_as, **sizes)).eval()


def primus(crop_size=(32, 24, 40), **sizes):
    return encoder_of(PrimusConfig, PrimusModel, crop_size, **sizes)


def resenc(crop_size=(64, 64, 64), **sizes):
    return encoder_of(ResEncConfig, ResEncModel, crop_size, **sizes)


def written(content, tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    torch.save(content, path)
    return path


def build(plan, patch_size, channels, classes=3):
    """The network that the plan asks for, built as nnU-Net's main branch does (July 2026; in no release yet)."""
    name, numbers = plan["architecture_plans"]["arch_class_name"], plan["architecture_plans"]["arch_kwargs"]
    imported = plan["architecture_plans"]["arch_kwargs_requiring_import"]
    if name in PRIMUS:
        return PRIMUS[name](channels, classes, patch_embed_size=(8, 8, 8), input_shape=patch_size)
    if name == "ResEncL":
        numbers, imported = RESENC_L, ["conv_op", "norm_op", "dropout_op", "nonlin"]
        name = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    if name == "Primus":
        return pydoc.locate("dynamic_network_architectures.architectures.primus.Primus")(
            channels,
            numbers["embed_dim"],
            numbers["patch_embed_size"],
            classes,
            numbers["encoder_eva_depth"],
            numbers["encoder_eva_numheads"],
            patch_size,
            init_values=numbers["init_values"],
            scale_attn_inner=numbers["scale_attn_inner"],
        )
    return get_network_from_plans(name, numbers, imported, channels, classes, deep_supervision=False)


def fine_tune_from(path, channels=1, patch_size=None):
    """nnU-Net's fine-tuning path: plan out of the checkpoint, network, strict load of encoder and stem by its keys."""
    content = torch.load(path, weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    configuration = next(iter(plan["pretrain_plan"]["configurations"].values()))
    patch_size = patch_size or plan["recommended_downstream_patchsize"]
    network = build(plan, tuple(patch_size), channels)
    assert (network.key_to_encoder, network.key_to_stem) == (plan["key_to_encoder"], plan["key_to_stem"])
    assert list(network.keys_to_in_proj) == plan["keys_to_in_proj"]

    def below(key):
        return {n.removeprefix(key + "."): w for n, w in weights.items() if n.startswith(key + ".")}

    stem, encoder = below(plan["key_to_stem"]), below(plan["key_to_encoder"])
    if channels > plan["pretrain_num_input_channels"]:
        for key in plan["keys_to_in_proj"]:
            name = key.removeprefix(plan["key_to_stem"] + ".") + ".weight"
            stem[name] = stem[name].repeat(1, channels, 1, 1, 1) / channels
    if plan["key_to_lpe"] and list(patch_size) != configuration["patch_size"]:
        old, new = ([n // 8 for n in size] for size in (configuration["patch_size"], patch_size))
        position = encoder["pos_embed"].transpose(1, 2).unflatten(2, old)
        encoder["pos_embed"] = F.interpolate(position, new, mode="trilinear").flatten(2).transpose(1, 2)
    network.get_submodule(plan["key_to_encoder"]).load_state_dict(encoder, strict=True)
    network.get_submodule(plan["key_to_stem"]).load_state_dict(stem, strict=True)
    return network.eval()


def assert_same_features(network, encoder, crop):
    with torch.no_grad():
        if encoder.config.model_type == "primus":
            assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 1e-5
        else:
            ours = encoder(crop, output_hidden_states=True).hidden_states
            for our_map, their_map in zip(ours, network.encoder(crop), strict=True):
                assert difference(our_map, their_map) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["pretrained", "fresh"])
def test_the_released_loader_takes_the_whole_resenc_l(decoder, tmp_path, capsys):
    student = MaskedResEnc(resenc(), reconstructs=True, dense=False, pooled=False).eval()
    encoder = student.features.encoder
    given = student.decoder.state_dict() if decoder == "pretrained" else None
    path = written(checkpoint(encoder, given, "test", {}), tmp_path)
    network = get_network_from_plans(
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        RESENC_L,
        ["conv_op", "norm_op", "dropout_op", "nonlin"],
        1,
        3,
        deep_supervision=True,
    )
    load_pretrained_weights(network, path)
    assert "Loading pretrained weights" in capsys.readouterr().out
    crop = torch.randn(1, 1, 64, 64, 64)
    assert_same_features(network, encoder, crop)
    if decoder == "pretrained":
        seen = []
        network.decoder.stages[-1].register_forward_hook(lambda *arguments: seen.append(arguments[2]))
        student.decoder.stages[-1].register_forward_hook(lambda *arguments: seen.append(arguments[2]))
        with torch.no_grad():
            network(crop)
            student.decoder(encoder(crop, output_hidden_states=True).hidden_states)
        assert difference(seen[1], seen[0]) < 1e-5


def completed_by_the_planner(plans):
    """What nnU-Net's planner adds to configurations of a file that it finds: its own (here what ours builds on)."""
    own = {"batch_size": 7, "batch_dice": True, "spacing": [3.0, 1.0, 1.0], "data_identifier": "nnUNetPlans_3d_fullres"}
    return PlansManager({"configurations": {"3d_fullres": own, **json.loads(json.dumps(plans))["configurations"]}})


@pytest.mark.parametrize("spacing", ["native", [1.0, 1.5, 1.0]])
def test_the_released_plans_build_the_bundle_s_network(spacing, tmp_path):
    encoder = resenc((32, 24, 40), **TINY_RESENC, num_channels=2)
    encoder.config.preprocessing |= {"spacing": spacing}
    configuration = completed_by_the_planner(released_plans(encoder.config)).get_configuration(CONFIGURATION)
    assert configuration.patch_size == [32, 24, 40]
    assert configuration.spacing == ([3.0, 1.0, 1.0] if spacing == "native" else spacing)
    assert configuration.normalization_schemes == ["ZScoreNormalization"] * 2
    assert configuration.use_mask_for_norm == [False] * 2
    assert configuration.batch_dice  # as planned for the data
    assert configuration.data_identifier != "nnUNetPlans_3d_fullres"
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        2,
        5,
        deep_supervision=True,
    )
    with (
        pytest.warns(UserWarning, match="choose its spacing by hand") if spacing != "native" else nullcontext()
    ):  # which axis is which
        content = checkpoint(encoder, None, "test", {})
    load_pretrained_weights(network, written(content, tmp_path))
    assert_same_features(network, encoder, torch.randn(1, 2, 32, 24, 40))


def test_the_released_plans_of_resenc_l_are_its_numbers():
    config = ResEncConfig(image_size=(64, 64, 64), preprocessing=preprocessing("RAS", (1.0, 1.0, 1.0), (64, 64, 64)))
    (configuration,) = released_plans(config)["configurations"].values()
    assert configuration["architecture"]["arch_kwargs"] == RESENC_L


def test_the_release_loads_no_primus():
    config = primus(**TINY_PRIMUS).config
    assert released_plans(config) is None  # its decoder's last layer, of as many classes as the data, must fit too
    assert "-pretrained_weights" not in nnunet_section(primus(**TINY_PRIMUS), "folder", False, "run", False)


TRAINER = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

class TwoSteps(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1

    def on_train_start(self):
        if not self.was_initialized:
            self.initialize()
        with torch.no_grad():
            torch.save(self.network.encoder(torch.load("crop.pt")), "features.pt")
        super().on_train_start()

    def on_train_epoch_end(self, outputs):
        torch.save([float(output["loss"]) for output in outputs], "losses.pt")
        super().on_train_epoch_end(outputs)
"""


def fine_tune_by_the_card(encoder, trainers, said, tmp_path):
    """Follow the card's commands that speak of `said` with two small volumes, and this file of trainers; the losses."""
    written(checkpoint(encoder, None, "tiny", {}), tmp_path)
    (tmp_path / "nnunet_plans.json").write_text(json.dumps(released_plans(encoder.config)))
    raw = tmp_path / "raw" / "Dataset007_Foam"
    for folder in (raw / "imagesTr", raw / "labelsTr", tmp_path / "trainers"):
        folder.mkdir(parents=True)
    for number in range(2):
        volume = blobs(number)
        save_nifti(raw / "imagesTr" / f"case{number}_0000.nii.gz", volume)
        save_nifti(raw / "labelsTr" / f"case{number}.nii.gz", (volume > np.median(volume)).astype(np.uint8))
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "foam": 1}}
    (raw / "dataset.json").write_text(json.dumps({**about, "numTraining": 2, "file_ending": ".nii.gz"}))
    (tmp_path / "trainers" / "two_steps.py").write_text(trainers)
    blocks = re.findall(r"```bash\n(.*?)```", nnunet_section(encoder, ".", False, "tiny", False), re.DOTALL)
    (commands,) = (block for block in blocks if said in block)
    for word, value in {
        "DATASET_ID": "7 -np 1 -npfp 1",
        "DATASET": "Dataset007_Foam",
        "FOLD": "all -device cpu -tr TwoSteps",
        " -tr Pretrained": "",
    }.items():
        commands = commands.replace(word, value)
    folders = {"nnUNet_extTrainer": "trainers", "nnUNet_results": "results", "nnUNet_preprocessed": "preprocessed"}
    environment = {**os.environ, **folders, "nnUNet_raw": "raw", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    results = tmp_path / "results" / "Dataset007_Foam" / f"TwoSteps__tiny__{CONFIGURATION}" / "fold_all"
    assert (results / "checkpoint_final.pth").is_file()
    assert (results / "validation" / "summary.json").is_file()
    losses = torch.load(tmp_path / "losses.pt")
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_the_release_fine_tunes_by_the_commands_of_the_card(tmp_path):
    encoder, crop = resenc((32, 32, 32), **TINY_RESENC), torch.randn(1, 1, 32, 32, 32)
    torch.save(crop, tmp_path / "crop.pt")
    fine_tune_by_the_card(encoder, TRAINER, "-pretrained_weights", tmp_path)
    with torch.no_grad():
        ours = encoder(crop, output_hidden_states=True).hidden_states
    for our_map, their_map in zip(ours, torch.load(tmp_path / "features.pt"), strict=True):
        assert difference(our_map, their_map) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_the_plan_loads_resenc_l(channels, tmp_path):
    encoder = resenc()
    network = fine_tune_from(written(checkpoint(encoder, None, "test", {}), tmp_path), channels)
    crop = torch.randn(1, 1, 64, 64, 64).expand(-1, channels, -1, -1, -1)
    assert_same_features(network, encoder.resize_input_channels(channels), crop)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2])
def test_the_plan_loads_primus_m(channels, tmp_path):
    encoder = primus()
    network = fine_tune_from(written(checkpoint(encoder, None, "test", {}), tmp_path), channels)
    crop = torch.randn(1, 1, 32, 24, 40).expand(-1, channels, -1, -1, -1)
    assert_same_features(network, encoder.resize_input_channels(channels), crop)


@pytest.mark.slow
def test_another_patch_size_downstream_gives_our_features_of_that_size(tmp_path):
    encoder = primus(**PRIMUS_SIZES["S"])
    network = fine_tune_from(written(checkpoint(encoder, None, "test", {}), tmp_path), patch_size=[24, 32, 16])
    assert_same_features(network, encoder, torch.randn(1, 1, 24, 32, 16))


@pytest.mark.parametrize("encoder", [primus(**TINY_PRIMUS), resenc(**TINY_RESENC)], ids=["primus", "resenc"])
def test_sizes_without_a_name_are_spelled_out(encoder, tmp_path):
    network = fine_tune_from(written(checkpoint(encoder, None, "test", {}), tmp_path))
    assert_same_features(network, encoder, torch.randn(2, 1, *encoder.config.image_size))


@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
def test_plans_name_the_published_sizes(size):
    plan = adaptation_plan(primus(**PRIMUS_SIZES[size]).config, "test")
    assert plan["architecture_plans"]["arch_class_name"] == f"Primus{size}"


def test_the_plan_is_the_one_the_consumers_read():
    plan = adaptation_plan(primus(**TINY_PRIMUS).config, "run")
    assert json.loads(json.dumps(plan)) == plan
    assert list(plan["pretrain_plan"]["configurations"]) == ["onemmiso"]
    configuration = plan["pretrain_plan"]["configurations"]["onemmiso"]
    assert configuration["spacing"] == [1.0, 1.0, 1.0]
    assert configuration["patch_size"] == plan["recommended_downstream_patchsize"] == [32, 24, 40]
    assert plan["key_to_lpe"] == "eva.pos_embed"
    assert adaptation_plan(resenc(**TINY_RESENC).config, "run")["key_to_lpe"] is None


def test_the_plan_of_volumes_with_their_own_spacing_leaves_it_to_nnunet():
    encoder = primus(**TINY_PRIMUS, num_channels=2)
    encoder.config.preprocessing |= {"spacing": "native", "channels": ["T1w", "FLAIR"], "coarsest_last": True}
    with pytest.warns(UserWarning, match="whose last axis is the volume's coarsest"):
        plan = adaptation_plan(encoder.config, "run")
    assert plan["pretrain_num_input_channels"] == 2
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing_style"] == "noresample"
    assert configuration["spacing"] is None  # for which it has an answer of its own
    words = nnunet_section(encoder, "folder", False, "run", has_decoder=False)
    assert "-am no_resample" in words
    assert "Spacing__None_None_None___Norm__Z" in words
    card = model_card(encoder, {}, "folder", nnunet=words)
    assert "Every volume keeps its own voxel size, none is resampled." in card
    assert 'processor({"T1w": "brain_T1w.nii.gz", "FLAIR": "brain_FLAIR.nii.gz"})' in card
    assert "their last axis lies along the coarsest axis of the volume" in card


def test_an_encoder_that_nnunet_cannot_build_is_refused():
    with pytest.raises(ValueError, match="no register tokens"):
        adaptation_plan(primus(**TINY_PRIMUS, num_register_tokens=4).config, "run")


def test_one_tensor_is_stored_once(tmp_path):
    encoder = resenc(**TINY_RESENC)
    path = written(checkpoint(encoder, None, "test", {}), tmp_path)
    parameters = 4 * sum(p.numel() for p in MaskedResEnc(encoder, True, False, False).parameters())
    assert path.stat().st_size < 1.5 * parameters + 100_000  # four names a tensor, one copy


@pytest.mark.parametrize("encoder", [primus(**TINY_PRIMUS), resenc(**TINY_RESENC)], ids=["primus", "resenc"])
def test_our_own_checkpoint_is_a_warm_start_that_asks_nothing(encoder, tmp_path):
    path = written(checkpoint(encoder, None, "test", {}), tmp_path)
    fresh = type(encoder)(encoder.config)
    decoders = SimpleNamespace(decoder_layers=1, feature_decoder_heads=2)
    wanted = {"reconstructs": True, "dense": True, "pooled": True}
    student = architecture(encoder.config.model_type).student(fresh, decoders, 0.75, **wanted)
    load_pretrained(student, str(path))
    assert all(torch.equal(w, encoder.state_dict()[name]) for name, w in fresh.state_dict().items())


@pytest.mark.parametrize(
    "encoder", [primus((16, 16, 16), **TINY_PRIMUS), resenc(**TINY_RESENC)], ids=["primus", "resenc"]
)
def test_a_whole_volume_is_segmented_as_by_monai_and_as_by_nnunet(encoder):
    torch.manual_seed(0)
    model = segmentation_class(encoder.config.model_type).from_encoder(encoder, {0: "a", 1: "b", 2: "c"}).eval()
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # probabilities that differ
    volume, crop_size = torch.randn(1, 24, 20, 16), (16, 16, 16)
    ours, monai, nnunet = (run(model, volume, crop_size) for run in inference.WAYS.values())
    assert ours.std() > 0.04
    assert torch.allclose(ours, monai, atol=1e-5)
    inner = (slice(None), *[slice(4, -4)] * 3)  # half precision, in which it adds up, has no weights for corners
    assert (ours - nnunet)[inner].abs().max() < 0.05  # its weights are centred half a voxel further
    assert (ours - nnunet)[inner].abs().mean() < 0.005
