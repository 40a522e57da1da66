"""PrimusV2 and PrimusV3: equal to dynamic-network-architectures, blind to what is hidden, and a row like any other."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_same_features_in_a_clean_process
from dynamic_network_architectures.architectures import primus as reference
from test_models import batch
from test_nnunet import TRAINER, fine_tune_by_the_card, written
from test_recipe import load_recipe
from test_reference import difference, load, randomise, shapes, tokens_of

from models import PRIMUS_SIZES, architecture, build_encoder, dense_features, load_encoder, segmentation_class
from models.conversion import from_reference, reference_names, segmentation_to_reference, to_reference
from models.nnunet import CONFIGURATION, adaptation_plan, checkpoint, released_plans
from models.warm_start import load_pretrained
from training.export import write_encoder
from training.model_card import model_card, nnunet_section
from training.student import preprocessing

VERSIONS = {"primus_v2": "V2", "primus_v3": "V3"}
BOTH = pytest.mark.parametrize("name", VERSIONS)
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODERS = SimpleNamespace(decoder_layers=1, feature_decoder_heads=2)
WANTED = {"reconstructs": True, "dense": True, "pooled": True}
NARROW = {"patch_size": (4, 4, 4), "embed_widths": [4, 6, 8]}
CROP = (16, 24, 16)


def encoder_of(name, crop_size=CROP, **sizes):
    torch.manual_seed(0)
    prepared_as = preprocessing("RAS", (1.0, 1.0, 1.0), crop_size)
    return build_encoder(name, crop_size, prepared_as, **{**TINY, **sizes}).eval()


def network_of(name, crop_size=CROP, channels=1, classes=2, **more):
    """Theirs, with random weights everywhere."""
    build = getattr(reference, f"Primus{VERSIONS[name]}")
    sizes = TINY["hidden_size"], (8, 8, 8), classes, TINY["num_hidden_layers"], TINY["num_attention_heads"], crop_size
    return randomise(build(channels, *sizes, init_values=0.1, scale_attn_inner=True, drop_path_rate=0.0, **more)).eval()


# --------------------------------------------------------------------------- equal to the reference


@BOTH
@pytest.mark.parametrize("channels", [1, 3])
def test_they_equal_the_reference(name, channels):
    network, encoder = network_of(name, channels=channels), encoder_of(name, num_channels=channels)
    left = load(encoder, network)
    assert all(n.startswith("up_projection.") or n == "mask_token" for n in left)
    crop = torch.randn(2, channels, *CROP)
    with torch.no_grad():
        ours, theirs = encoder(crop).last_hidden_state, tokens_of(network, crop)
    assert (ours - theirs).abs().max() < 2e-5
    assert difference(ours, theirs) < 2e-6


@BOTH
def test_their_gradients_equal_the_reference(name):
    network, encoder = network_of(name).double(), encoder_of(name).double()
    load(encoder, network)
    crop, weight = torch.randn(2, 1, *CROP, dtype=torch.double), torch.randn(2, 12, 24, dtype=torch.double)
    (encoder(crop).last_hidden_state * weight).sum().backward()
    (tokens_of(network, crop) * weight).sum().backward()
    theirs = dict(network.named_parameters())
    for n, parameter in encoder.named_parameters():
        other = theirs[reference_names(n, encoder.config)[0]].grad
        torch.testing.assert_close(parameter.grad, other.view_as(parameter), rtol=1e-5, atol=1e-6, msg=n)


@BOTH
def test_names_and_shapes_survive_the_way_there_and_back(name):
    network, encoder = network_of(name, channels=2), encoder_of(name, num_channels=2)
    load(encoder, network)
    again, theirs = to_reference(encoder.state_dict(), encoder.config), network.state_dict()
    assert again.keys() == {n for n in theirs if n.startswith(("down_projection.", "eva."))}
    for n, tensor in again.items():
        assert tensor.shape == theirs[n].shape, n  # scalars too
        assert torch.equal(tensor, theirs[n]), n


def test_other_widths_equal_the_reference_where_it_has_them():
    widths = {"depth_per_level": (1, 1, 1), "ch_per_level": (4, 6, 6, 10)}
    network, encoder = network_of("primus_v3", **widths), encoder_of("primus_v3", embed_widths=[4, 6, 6, 10])
    load(encoder, network)
    crop = torch.randn(1, 1, *CROP)
    assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 2e-6


@pytest.mark.parametrize("size", PRIMUS_SIZES)
@BOTH
def test_sizes(name, size):
    row, crop_size = architecture(name), (64, 64, 64)
    with torch.device("meta"):
        encoder = row.model._from_config(row.config(image_size=crop_size, **PRIMUS_SIZES[size]))
        network = getattr(reference, f"Primus{VERSIONS[name]}{size}")(1, 2, (8, 8, 8), crop_size)
    whole = sum(p.numel() for p in network.parameters())
    assert encoder.num_parameters() == whole - sum(p.numel() for p in network.up_projection.parameters())
    assert (
        shapes(encoder).keys() == from_reference(network.state_dict(), shapes(encoder), encoder.config).weights.keys()
    )
    if (name, size) == ("primus_v3", "S"):
        assert round(whole / 1e6, 1) == 70.6  # as nnU-Net counts it


@BOTH
def test_they_begin_like_the_reference(name):
    """Scale of every tensor: He for convolutions, unit norms, skips that begin as nothing."""
    build = getattr(reference, f"Primus{VERSIONS[name]}")
    torch.manual_seed(0)
    network = build(1, 96, (8, 8, 8), 2, 2, 2, CROP, init_values=0.1, scale_attn_inner=True)
    encoder = encoder_of(name, hidden_size=96)
    theirs = network.state_dict()
    for n, tensor in to_reference(encoder.state_dict(), encoder.config).items():
        spread, mean = tensor.std(correction=0), tensor.mean()
        assert torch.isclose(spread, theirs[n].std(correction=0), rtol=0.25, atol=1e-6), n
        assert torch.isclose(mean, theirs[n].mean(), atol=0.1 * float(spread) + 1e-6) or tensor.numel() < 1000, n
    tuned = segmentation_class(name).from_encoder(encoder, {0: "a", 1: "b"})  # the same within another model
    assert all(torch.equal(w, encoder.state_dict()[n]) for n, w in tuned.encoder.state_dict().items())
    fresh = segmentation_class(name)(encoder.config)
    for n, w in fresh.encoder.state_dict().items():
        if n.endswith(("scale", "norm.weight", "norm.bias")):
            assert torch.equal(w, encoder.state_dict()[n]), n


def test_more_channels_that_are_equal_give_the_features_of_one():
    for name in VERSIONS:
        encoder, crop = encoder_of(name, **NARROW), torch.randn(1, 1, *CROP)
        one = encoder(crop).last_hidden_state
        encoder.resize_input_channels(3)
        torch.testing.assert_close(encoder(crop.expand(-1, 3, -1, -1, -1)).last_hidden_state, one, atol=1e-4, rtol=0)


@BOTH
def test_tokens_lie_where_their_voxels_are(name):
    """Voxels of one token change it and its neighbours most; by the norms, all others a little."""
    encoder, crop = encoder_of(name, (24, 32, 16), **NARROW), torch.randn(1, 1, 24, 32, 16)
    for place in ((1, 1, 1), (4, 6, 2), (3, 2, 1)):
        changed, where = crop.clone(), tuple(slice(4 * n, 4 * n + 4) for n in place)
        changed[(..., *where)] = torch.randn(1, 1, 4, 4, 4)
        with torch.no_grad():
            moved = (dense_features(encoder, changed) - dense_features(encoder, crop)).square().sum(1)[0]
        assert moved.shape == (6, 8, 4)
        near = moved[tuple(slice(n - 1, n + 2) for n in place)].mean()
        assert near > 10 * moved.median()


# --------------------------------------------------------------------------- what is hidden stays hidden


def student_of(name, simmim, **sizes):
    encoder = encoder_of(name, **(sizes or NARROW))
    for skip in encoder.patch_embed.skips:
        torch.nn.init.constant_(skip.scale, 1.0)  # they must not hide a leak by being nothing
    decoders = SimpleNamespace(decoder_layers=0, feature_decoder_heads=None) if simmim else DECODERS
    return architecture(name).student(encoder, decoders, 0.75, **WANTED).eval()


@BOTH
@pytest.mark.parametrize("simmim", [False, True], ids=["mae", "simmim"])
def test_hidden_voxels_change_nothing_and_visible_ones_everything(name, simmim):
    data, student = batch(2, CROP, block=4), student_of(name, simmim)
    hidden = torch.nn.functional.interpolate(data["mask"][:, None].float(), size=CROP).bool()
    views, noise = data["views"], 5 * torch.randn(data["views"].shape)
    with torch.no_grad():
        seen, other_hidden, other_visible = (
            student(crops, data["mask"], hidden)
            for crops in (views, torch.where(hidden, noise, views), torch.where(hidden, views, noise))
        )
    assert seen.encoded[0].shape[1] == (96 if simmim else 24)
    for one, same, other in zip(*([*output[:3], *output.encoded] for output in (seen, other_hidden, other_visible))):
        assert torch.equal(one, same)
        assert not torch.allclose(one, other)
    assert seen.reconstruction.shape == views.shape


@BOTH
def test_one_visible_voxel_would_be_seen_through_the_norms_of_all_others(name):
    """Why hidden voxels leave the input: no token of an unmasked crop is without them."""
    encoder, crop = encoder_of(name, **NARROW), torch.randn(1, 1, *CROP)
    changed = crop.clone()
    changed[..., 0, 0, 0] += 5
    far = encoder.patch_embed(crop)[..., -1, -1, -1] - encoder.patch_embed(changed)[..., -1, -1, -1]
    assert far.abs().max() > 1e-5


@BOTH
def test_all_tokens_visible_is_the_plain_encoder(name):
    encoder, crop = encoder_of(name, **NARROW), torch.randn(2, 1, *CROP)
    plain = encoder(crop).last_hidden_state
    assert torch.equal(encoder(crop, torch.arange(96).expand(2, -1)).last_hidden_state, plain)
    nothing = {"masked_tokens": torch.zeros(2, 4, 6, 4, dtype=torch.bool), "mask_embedding": torch.ones(24)}
    assert torch.equal(encoder(crop, **nothing).last_hidden_state, plain)


@BOTH
def test_masked_tokens_enter_as_the_embedding(name):
    encoder, crop, entering = encoder_of(name, **NARROW), torch.randn(1, 1, *CROP), []
    torch.nn.init.zeros_(encoder.transformer.position_embedding)
    encoder.transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    mask, embedding = torch.rand(1, 4, 6, 4) < 0.5, torch.randn(24)
    encoder(crop, masked_tokens=mask, mask_embedding=embedding)
    hidden = entering[0][mask.flatten(1)]
    assert torch.equal(hidden, embedding.expand_as(hidden))


# --------------------------------------------------------------------------- rows like any other


@BOTH
def test_what_is_refused_says_the_remedy(name):
    with pytest.raises(ValueError, match="an entry for the stem and one for each halving of the axes"):
        encoder_of(name, patch_size=(4, 4, 4))
    with pytest.raises(ValueError, match="is damaged"):
        encoder_of(name, embed_widths=[2**16] * 4)
    with pytest.raises(ValueError, match="crops need 8 voxels along one axis"):
        encoder_of(name, **NARROW)(torch.randn(1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match="does not take embed_width"):
        encoder_of(name, embed_width=[4])
    recipe = ROOT / "recipes" / {"primus_v2": "primus_v2_m.yaml", "primus_v3": "primus_v3_s.yaml"}[name]
    with pytest.raises(ValueError, match="give 4, one for the stem"):
        load_recipe(recipe, ["model.embed_widths=[4,4]"])
    with pytest.raises(ValueError, match=r"must exceed model\.patch_size=8"):
        load_recipe(recipe, ["views.crop_size=[8,8,8]"])


@BOTH
def test_an_encoder_is_loaded_by_automodel_without_this_project(name, tmp_path):
    encoder, folder = encoder_of(name, **NARROW), tmp_path / "encoder"
    write_encoder(encoder, {}, model_card(encoder, {}, str(folder)), folder)
    weights = {f"student.features.encoder.{n}": w for n, w in encoder.state_dict().items()}
    assert_same_features_in_a_clean_process(folder, type(encoder), weights, CROP, tmp_path)
    assert type(load_encoder(folder)) is type(encoder)
    section = architecture(name).section.of_encoder(encoder.config)
    assert section["embed_widths"] == [4, 6, 8]
    assert section["architecture"] == name


# --------------------------------------------------------------------------- in the hands of nnU-Net


@BOTH
def test_the_checkpoint_fills_their_network_by_the_keys_of_its_plan(name, tmp_path):
    encoder, network = encoder_of(name), network_of(name)
    content = torch.load(written(checkpoint(encoder, None, "test", {}), tmp_path), weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    assert (network.key_to_encoder, network.key_to_stem) == (plan["key_to_encoder"], plan["key_to_stem"])
    assert list(network.keys_to_in_proj) == plan["keys_to_in_proj"]
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        below = {n.removeprefix(f"{key}."): w for n, w in weights.items() if n.startswith(f"{key}.")}
        network.get_submodule(key).load_state_dict(below, strict=True)
    crop = torch.randn(1, 1, *CROP)
    with torch.no_grad():
        assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 2e-6


@BOTH
def test_their_trained_network_is_a_warm_start_and_another_version_is_not(name, tmp_path):
    network, student = network_of(name), student_of(name, False, patch_size=(8, 8, 8))
    path = written({"network_weights": network.state_dict(), "trainer_name": "nnUNet_PrimusTrainer"}, tmp_path)
    assert "fresh: " in load_pretrained(student, str(path))  # the decoders
    encoder, crop = student.features.encoder, torch.randn(1, 1, *CROP)
    with torch.no_grad():
        assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 2e-6
    plain = architecture("primus").student(encoder_of("primus"), DECODERS, 0.75, **WANTED)
    with pytest.raises(ValueError, match="these are the weights of a primus_v"):
        load_pretrained(plain, str(path))


@BOTH
@pytest.mark.parametrize("size", PRIMUS_SIZES)
def test_plans_name_the_published_sizes(name, size):
    row = architecture(name)
    config = row.config(image_size=CROP, preprocessing=preprocessing("RAS", (1, 1, 1), CROP), **PRIMUS_SIZES[size])
    named = adaptation_plan(config, "test")["architecture_plans"]["arch_class_name"]
    assert named == f"Primus{VERSIONS[name]}{size}"
    assert issubclass(getattr(reference, named), getattr(reference, f"Primus{VERSIONS[name]}"))


def test_a_tokenizer_that_their_class_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"PrimusV2 has embed_widths \[32, 32, 64, 128\]"):
        adaptation_plan(encoder_of("primus_v2", embed_widths=[4, 6, 6, 10]).config, "test")


@BOTH
@pytest.mark.parametrize("size", [None, "S"])
def test_the_trainer_of_the_card_builds_their_network_with_our_weights(name, size, tmp_path, monkeypatch):
    encoder = encoder_of(name, **(PRIMUS_SIZES[size] if size else {}))
    written(checkpoint(encoder, None, "test", {}), tmp_path)
    words = nnunet_section(encoder, "folder", False, "run", False)
    assert "nnUNetv2_train_pretrained" not in words  # builds no such network
    assert "-pretrained_weights" not in words  # asks for a decoder
    (code,) = re.findall(r"```python\n(.*?)```", words, re.DOTALL)
    (configuration,) = released_plans(encoder.config)["configurations"].values()
    monkeypatch.chdir(tmp_path)
    exec(code, scope := {})
    plan = SimpleNamespace(patch_size=configuration["patch_size"])
    network = scope["Pretrained"].build_network_architecture(None, plan, 1, 5).eval()
    crop = torch.randn(1, 1, *CROP)
    with torch.no_grad():
        assert network(crop).shape == (1, 5, *CROP)
        assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 2e-6
    assert CONFIGURATION in words


@pytest.mark.slow
def test_the_release_fine_tunes_by_the_commands_of_the_card(tmp_path):
    encoder = encoder_of("primus_v3", (32, 32, 32), embed_widths=[4, 6, 6, 10])
    crop = torch.randn(1, 1, 32, 32, 32)
    torch.save(crop, tmp_path / "crop.pt")
    (trainer,) = re.findall(r"```python\n(.*?)```", nnunet_section(encoder, ".", False, "tiny", False), re.DOTALL)
    two_steps = TRAINER.replace("nnUNetTrainer):", "Pretrained):").replace(
        "network.encoder(", "network.down_projection("
    )
    fine_tune_by_the_card(encoder, trainer + two_steps, "-tr Pretrained", tmp_path)
    with torch.no_grad():
        assert difference(encoder.patch_embed(crop), torch.load(tmp_path / "features.pt")) < 1e-5


@BOTH
def test_a_segmentation_model_is_their_network(name):
    network, encoder = network_of(name, classes=3), encoder_of(name)
    model = segmentation_class(name).from_encoder(encoder, {0: "a", 1: "b", 2: "c"}).eval()
    weights = segmentation_to_reference(model)
    assert weights.keys() == network.state_dict().keys()
    network.load_state_dict(weights)
    crop = torch.randn(1, 1, *CROP)
    with torch.no_grad():
        assert difference(model(crop).logits, network(crop)) < 1e-5
