"""Weights of others: how their files look, what becomes of them. The reference networks write them."""

import json

import pytest
import torch
from conftest import ROOT, config, launch
from foreign_weights import (
    BY_HAND,
    PRIMUS_ARGUMENTS,
    RESENC,
    encoder_alone,
    plan,
    publish,
    released,
    released_resenc,
    resenc_arguments,
)
from safetensors.torch import save_file
from test_finetune import SHORT, write_labelled
from test_nnunet import assert_same_features, fine_tune_from
from test_primus_versions import VERSIONS, network_of
from test_reference import difference, randomise, reference_primus, tokens_of
from test_warm_start import MaskedAutoencoder, primus_student, resenc_student
from torch import nn
from transformers import AutoImageProcessor

from benchmarks.evaluate_encoder import open_encoder
from finetuning.taken_over import numbers_of_encoder
from models import warm_start
from models.warm_start import load_pretrained


@pytest.fixture
def resenc(tmp_path):
    return released_resenc(tmp_path / "theirs")


# --------------------------------------------------------------------------- --init-from


@pytest.mark.parametrize("wrapper", [None, "network_weights", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "encoder.", "module.", "_orig_mod.", "module._orig_mod.encoder.", "backbone."])
def test_an_encoder_alone_is_known_behind_any_prefix_and_wrapper(prefix, wrapper, tmp_path):
    network, student = encoder_alone(), resenc_student()
    weights = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    weights["head.weight"] = torch.zeros(3)
    torch.save({wrapper: weights, "epoch": 3} if wrapper else weights, tmp_path / "e.pth")
    report = load_pretrained(student, str(tmp_path / "e.pth"))
    ours = len(student.features.encoder.state_dict())
    assert f"{ours} tensors, 0.0 M parameters, no decoder" in report
    assert "left: 1 of head, neither encoder nor reconstruction decoder" in report
    crop = torch.randn(1, 1, 16, 16, 16)
    stages = student.features.encoder(crop, output_hidden_states=True).hidden_states
    assert all(difference(our, their) < 1e-5 for our, their in zip(stages, network(crop), strict=True))


def test_the_plan_chooses_among_several_encoders(tmp_path):
    networks = {name: encoder_alone() for name in ("online_encoder", "target_encoder")}
    nn.init.zeros_(networks["target_encoder"].stem.convs[0].conv.weight)
    weights = {f"{key}.{name}": w for key, network in networks.items() for name, w in network.state_dict().items()}
    content = {"network_weights": weights, "nnssl_adaptation_plan": {"key_to_stem": "online_encoder.stem"}}
    torch.save(content, tmp_path / "byol.pth")
    student = resenc_student()
    assert "of target_encoder" in load_pretrained(student, str(tmp_path / "byol.pth"))
    assert torch.equal(student.features.encoder.stem.conv.weight, networks["online_encoder"].stem.convs[0].conv.weight)
    torch.save(weights, tmp_path / "byol.pth")
    with pytest.raises(ValueError, match=r"several encoders \(online_encoder\., target_encoder\.\)"):
        load_pretrained(resenc_student(), str(tmp_path / "byol.pth"))


def test_a_deeper_encoder_is_not_loaded_in_part(tmp_path):
    network = encoder_alone(1, {**RESENC, "depths": [1, 2, 3]})
    torch.save(network.state_dict(), tmp_path / "deep.pth")
    with pytest.raises(ValueError, match=r"of their encoder's tensors have no place in it \(encoder\.stages\.2"):
        load_pretrained(resenc_student(), str(tmp_path / "deep.pth"))


def test_the_plan_beside_the_weights_tells_trainer_and_crop(tmp_path):
    """It is right where the one inside is not: PrimusM-OpenMind-VoCo saw 64^3, of the 256 x 256 x 64 that it names."""
    network = randomise(MaskedAutoencoder((16, 32, 16), "xyz"))
    inside = plan("PrimusX", PRIMUS_ARGUMENTS, (256, 256, 64))
    folder = released(tmp_path / "x", network, inside)
    beside = plan("PrimusX", PRIMUS_ARGUMENTS, (16, 32, 16), trainer_name="SimMIMEvaTrainer")
    (folder / "fold_all").mkdir()
    (folder / "checkpoint_final.pth").rename(folder / "fold_all" / "checkpoint_final.pth")  # as a run of nnssl has it
    (folder / "adaptation_plan.json").write_text(json.dumps(beside))
    report = load_pretrained(primus_student(), str(folder / "fold_all"))
    assert "resized from (2, 4, 2) to (3, 3, 2)" in report


def test_a_configuration_of_others_beside_the_weights_is_none_of_ours(resenc):
    _, folder = resenc
    assert numbers_of_encoder(str(folder)) == []  # the recipe must fit it
    assert "of them the decoder's" in load_pretrained(resenc_student(), str(folder))


# --------------------------------------------------------------------------- publish.py


def test_a_released_resenc_becomes_a_folder_that_everything_takes(resenc, tmp_path, capsys):
    network, theirs = resenc
    encoder = publish(theirs, tmp_path / "ours", "--source", "MIC-DKFZ/nnFoundationCNN")
    said = capsys.readouterr().out
    for words in (
        "spacing native (its plan)",
        "orientation SAR (its plan, for files",
        "intensity z-score",
        "crop 16 x 16 x 16",
    ):
        assert words in said, words
    assert "of them the decoder's" in said
    crop = torch.randn(1, 1, 16, 24, 16)
    with torch.no_grad():
        ours = encoder(crop, output_hidden_states=True).hidden_states
        assert all(difference(our, their) < 1e-5 for our, their in zip(ours, network.encoder(crop), strict=True))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    assert (processor.orientation, processor.spacing) == ("SAR", "native")
    assert_same_features(fine_tune_from(tmp_path / "ours" / "checkpoint_final.pth"), encoder, crop[..., :16, :])
    content = torch.load(tmp_path / "ours" / "checkpoint_final.pth", weights_only=True)
    assert content["citations"][0]["apa_citations"] == ["Doe, J. (2026). A method"]
    of_decoder = "decoder.transpconvs.0.weight"
    assert torch.equal(content["network_weights"][of_decoder], network.state_dict()[of_decoder])

    assert "data.spacing=native" in numbers_of_encoder(str(tmp_path / "ours"))
    student = resenc_student()
    load_pretrained(student, str(tmp_path / "ours"))
    assert torch.equal(student.features.encoder.stem.conv.weight, encoder.stem.conv.weight)
    assert open_encoder(str(tmp_path / "ours")).config.preprocessing["orientation"] == "SAR"


def test_the_card_of_others_weights_claims_no_training_of_ours(resenc, tmp_path):
    publish(resenc[1], tmp_path / "ours", "--source", "a lab's page")
    card = (tmp_path / "ours" / "README.md").read_text()
    for words in (
        "license: cc-by-sa-4.0",
        "The weights: cc-by-sa-4.0",
        "trained by others and converted",
        "a lab's page",
        "`theirs/checkpoint_final.pth (sha256 ",
        "a network that its plan calls ResidualEncoderUNet",
        "with this project's code, which is not what prepared the training data",
        "crops of 32 x 32 x 32 voxels for fine-tuning",
        "Doe, J. (2026). A method. ResEnc: ",
    ):
        assert words in card, words
    for words in (
        "without labels",
        "self-supervised",
        "Recipe",
        "Losses reached",
        "its author has not said",
        "with None",
    ):
        assert words not in card, words
    publish(tmp_path / "ours", tmp_path / "again", license=None)  # which it knows by now
    for name in ("README.md", "pretraining.json"):
        again, before = ((tmp_path / at / name).read_text() for at in ("again", "ours"))
        assert again.replace("again", "ours") == before, name


@pytest.mark.parametrize("order", ["xyz", "yxz"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_released_primus_keeps_its_features(order, beside, tmp_path):
    network = randomise(MaskedAutoencoder((24, 24, 16), order))
    trainer = {"yxz": "nnFoundationViT_large_trainer", "xyz": None}[order]
    a_plan = plan("PrimusX", PRIMUS_ARGUMENTS, (24, 24, 16), spacing=[1, 1, 2], transpose_forward=[2, 0, 1])
    theirs = released(tmp_path / "theirs", network, a_plan | ({"trainer_name": trainer} if trainer else {}), beside)
    encoder = publish(theirs, tmp_path / "ours", *([] if trainer else ["--init-token-order", order]))
    assert encoder.config.image_size == [24, 24, 16]
    assert encoder.config.preprocessing["orientation"] == "RSA"  # [Z, Y, X] of RAS, X first
    assert encoder.config.preprocessing["spacing"] == [1.0, 1.0, 2.0]
    crop = torch.randn(2, 1, 24, 24, 16)
    with torch.no_grad():
        ours = encoder(crop, stages=["stage2"]).feature_maps["stage2"]
        assert difference(ours, network.encode(crop)) < 1e-5


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_without_a_plan_sizes_are_read_from_the_tensors(suffix, tmp_path):
    sizes = {"hidden_sizes": [4, 6, 10, 10], "strides": [1, 2, 1, 2], "depths": [1, 3, 1, 2]}
    network, path = encoder_alone(3, sizes), tmp_path / f"e.{suffix}"
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save(weights, path) if suffix == "pth" else save_file(weights, path)
    encoder = publish(path, tmp_path / "ours", *BY_HAND)
    assert encoder.config.num_channels == 3
    assert {key: getattr(encoder.config, key) for key in sizes} == sizes
    assert encoder.config.preprocessing["spacing"] == [1.0, 1.0, 1.5]
    crop = torch.randn(1, 3, 16, 16, 24)
    with torch.no_grad():
        ours = encoder(crop, output_hidden_states=True).hidden_states
        assert all(difference(our, their) < 1e-5 for our, their in zip(ours, network(crop), strict=True))


def test_a_primus_without_a_plan_has_the_published_heads_and_a_cube(tmp_path):
    network = reference_primus((16, 16, 16), 2, size=(396, 12, 6))
    torch.save(network.state_dict(), tmp_path / "s.pth")
    how = ["--spacing", "native", "--orientation", "LPS", "--intensity", "percentile", "low=0.5", "high=99.5"]
    with pytest.raises(ValueError, match="--init-token-order"):
        publish(tmp_path / "s.pth", tmp_path / "ours", *how)
    encoder = publish(tmp_path / "s.pth", tmp_path / "ours", *how, "--init-token-order", "xyz")
    assert (encoder.config.num_attention_heads, encoder.config.image_size) == (6, [16, 16, 16])
    crop = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        tokens, _ = network.eva(network.down_projection(crop).flatten(2).transpose(1, 2))
        assert difference(encoder(crop).last_hidden_state, tokens) < 1e-5


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("planned", [False, True])
def test_a_later_primus_is_known_by_its_tokenizer(name, planned, tmp_path):
    version = f"Primus{VERSIONS[name]}"
    network, crop = network_of(name, (16, 24, 16)), torch.randn(2, 1, 16, 24, 16)
    arguments = PRIMUS_ARGUMENTS | {"embed_dim": 24, "input_shape": (16, 24, 16)}
    theirs = released(tmp_path / "theirs", network, plan(version, arguments, (16, 24, 16)) if planned else {})
    if not planned:  # no tensor tells the heads of a size that is not published
        with pytest.raises(ValueError, match="how many attention heads"):
            publish(theirs, tmp_path / "ours", *BY_HAND)
        return
    encoder = publish(theirs, tmp_path / "ours")
    assert encoder.config.model_type == name
    with torch.no_grad():
        assert difference(encoder(crop).last_hidden_state, tokens_of(network, crop)) < 1e-5
    other = {"PrimusV2": "PrimusV3", "PrimusV3": "PrimusV2"}[version]
    wrong = released(tmp_path / "wrong", network, plan(other, arguments, (16, 24, 16)))
    with pytest.raises(ValueError, match=r"adaptation_plan\.json|have no place in it"):
        publish(wrong, tmp_path / "ours")


def test_a_name_of_the_hub_is_taken_and_told(resenc, tmp_path, monkeypatch):
    _, theirs = resenc
    snapshot = tmp_path / "models--lab--cnn" / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    theirs.rename(snapshot)
    (snapshot / "adaptation_plan.json").write_text(json.dumps(plan("ResidualEncoderUNet", resenc_arguments())))
    monkeypatch.setattr(warm_start, "list_repo_files", lambda **repo: [file.name for file in snapshot.iterdir()])

    def downloaded(repo_id, revision, allow_patterns):
        assert (repo_id, revision) == ("lab/cnn", "v1")
        assert {"checkpoint_final.pth", "adaptation_plan.json"} <= {*allow_patterns}
        return snapshot

    monkeypatch.setattr(warm_start, "snapshot_download", downloaded)
    publish("lab/cnn@v1", tmp_path / "ours")
    assert "`lab/cnn@c0ffee`" in (tmp_path / "ours" / "README.md").read_text()


@pytest.mark.slow
def test_the_scripts_take_the_folder(resenc, tmp_path):
    publish(resenc[1], tmp_path / "ours", "--spacing", "1", "1", "1")
    data = write_labelled(tmp_path / "data")
    how = ["--encoder", tmp_path / "ours", "--data", data, "--output", tmp_path / "run", "--config", config("ddp")]
    done = launch(*how, *SHORT, script=ROOT / "finetune.py")
    assert "model.safetensors: 47 tensors" in done.stdout
    assert (tmp_path / "run" / "scores.json").is_file()
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "orientation: SAR" in recipe
    done = launch(tmp_path / "ours", "--data", data / "images", script=ROOT / "benchmarks" / "evaluate_encoder.py")
    assert "retrieval" in done.stdout
