"""Starting from weights that others trained: what is loaded, in which order, and what is refused."""

import hashlib
import json

import pytest
import torch
from conftest import TINY, config, launch
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode, PatchEmbed
from safetensors.torch import load_file, save_file
from test_reference import difference, randomise, reference_resenc
from torch import nn

from models import build_encoder, warm_start
from models.features import tokens_to_map
from models.masked_primus import MaskedPrimus
from models.masked_resenc import MaskedResEnc
from models.warm_start import find, load_pretrained, origin

RESENC = {"hidden_sizes": [4, 8, 8], "strides": [1, 2, 2], "depths": [1, 2, 2]}
PRIMUS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
STILL = ["teacher.momentum=1.0", "teacher.final_momentum=1.0"]


class MaskedAutoencoder(nn.Module):
    """A Primus autoencoder as nnssl trains it: their parts and names; `order` is how tokens are numbered."""

    def __init__(self, shape, order):
        super().__init__()
        grid = tuple(n // 8 for n in shape)
        self.order = order
        self.down_projection = PatchEmbed((8, 8, 8), 1, 48)
        self.up_projection = PatchDecode((8, 8, 8), 48, 1)
        numbers = {"num_heads": 2, "ref_feat_shape": grid, "init_values": 0.1, "scale_attn_inner": True}
        self.eva = Eva(48, 2, **numbers)
        self.decoder = Eva(48, 1, **numbers)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 48))

    def encode(self, crop):
        cells = self.down_projection(crop)
        cells = cells.transpose(2, 3) if self.order == "yxz" else cells  # the second axis slowest
        tokens, _ = self.eva(cells.flatten(2).transpose(1, 2))
        return self.to_map(tokens, cells.shape[2:])

    def to_map(self, tokens, grid):
        cells = tokens.transpose(1, 2).unflatten(2, grid)
        return cells.transpose(2, 3) if self.order == "yxz" else cells

    def forward(self, crop):
        cells = self.encode(crop)
        cells = cells.transpose(2, 3) if self.order == "yxz" else cells
        tokens, _ = self.decoder(cells.flatten(2).transpose(1, 2))
        return self.up_projection(self.to_map(tokens, cells.shape[2:]))


def primus_student(shape=(24, 24, 16), decoder_layers=1, **changes):
    torch.manual_seed(1)
    encoder = build_encoder("primus", shape, {}, **{**PRIMUS, **changes})
    return MaskedPrimus(encoder, 0.75, True, True, True, decoder_layers, feature_decoder_heads=2).eval()


def resenc_student():
    torch.manual_seed(1)
    return MaskedResEnc(build_encoder("resenc", (16, 16, 16), {}, **RESENC), True, True, True).eval()


def nnssl_checkpoint(network, path, trainer=None, patch_size=None, prefix=""):
    configurations = {"onemmiso": {"patch_size": patch_size, "spacing": [1, 1, 1]}} if patch_size else {}
    weights = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    content = {
        "network_weights": weights,
        "trainer_name": trainer,
        "current_epoch": 3,
        "optimizer_state": {"state": {0: {"momentum": torch.zeros(3)}}},
        "nnssl_adaptation_plan": {"pretrain_plan": {"configurations": configurations}},
    }
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("order", "trainer", "said"),
    [
        ("yxz", "BaseEvaMAETrainer_BS8", None),
        ("yxz", "VoCoEvaTrainer", None),
        ("xyz", "SimMIMEvaTrainer", None),
        ("xyz", "AlignedMAEFTLR3EvaTrainer", None),
        ("xyz", "SimCLREvaTrainer", "xyz"),
    ],
)
def test_a_primus_autoencoder_keeps_its_features_and_its_reconstruction(order, trainer, said, tmp_path):
    shape = (24, 24, 16)
    network, student = randomise(MaskedAutoencoder(shape, order)), primus_student(shape)
    report = load_pretrained(student, nnssl_checkpoint(network, tmp_path / "mae.pth", trainer), said)
    assert "reordered from yxz" in report if order == "yxz" else "reordered" not in report
    assert "fresh" not in report
    crop = torch.randn(2, 1, *shape)
    ours = student.features.encoder(crop, stages=["stage2"]).feature_maps["stage2"]
    assert difference(ours, network.encode(crop)) < 1e-5
    tokens = student.decoder(ours.flatten(2).transpose(1, 2), ours.shape[2:])
    assert (
        difference(
            student.patch_decoder(tokens_to_map(tokens, student.features.encoder.config.grid_size)), network(crop)
        )
        < 1e-5
    )
    assert torch.equal(student.mask_token, network.mask_token)


def test_the_wrong_order_would_have_given_other_features(tmp_path):
    shape = (24, 24, 16)
    network, student = randomise(MaskedAutoencoder(shape, "yxz")), primus_student(shape)
    load_pretrained(student, nnssl_checkpoint(network, tmp_path / "mae.pth"), "xyz")
    crop = torch.randn(2, 1, *shape)
    ours = student.features.encoder(crop, stages=["stage2"]).feature_maps["stage2"]
    assert difference(ours, network.encode(crop)) > 0.01


def test_an_order_that_is_not_known_is_asked_for(tmp_path):
    path = nnssl_checkpoint(MaskedAutoencoder((24, 24, 16), "yxz"), tmp_path / "x.pth", "SimCLREvaTrainer")
    with pytest.raises(ValueError, match=r"SimCLREvaTrainer does not tell .* --init-token-order"):
        load_pretrained(primus_student(), path)


def test_an_order_that_cannot_be_converted_is_refused(tmp_path):
    path = nnssl_checkpoint(MaskedAutoencoder((16, 24, 16), "yxz"), tmp_path / "x.pth", "BaseEvaMAETrainer")
    with pytest.raises(ValueError, match="only for crops with X = Y"):
        load_pretrained(primus_student((16, 24, 16)), path)
    path = nnssl_checkpoint(MaskedAutoencoder((16, 24, 16), "yxz"), tmp_path / "x.pth", "EvaMAE", [16, 24, 16])
    with pytest.raises(ValueError, match="only for crops with X = Y"):
        load_pretrained(primus_student((24, 24, 16)), path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_resenc_u_net_is_loaded_with_its_decoder(suffix, prefix, tmp_path):
    network, student = reference_resenc(1, RESENC, classes=1), resenc_student()
    path = tmp_path / f"mae.{suffix}"
    if suffix == "pth":
        nnssl_checkpoint(network, path, "BaseMAETrainer", prefix=prefix)
    else:
        save_file({prefix + n: w.clone() for n, w in network.state_dict().items()}, path)
    report = load_pretrained(student, str(path))
    assert "of them the decoder's" in report
    assert "seg_layers" not in report
    assert "fresh" not in report
    crop = torch.randn(1, 1, 16, 16, 16)
    stages = student.features.encoder(crop, output_hidden_states=True).hidden_states
    assert difference(student.decoder(stages), network(crop)) < 1e-5


def test_an_encoder_alone_leaves_the_decoder_fresh_and_says_so(tmp_path):
    network = reference_resenc(1, RESENC)
    weights = {f"encoder.{n}": w.clone() for n, w in network.encoder.state_dict().items()}
    weights["projector.0.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "s.safetensors")
    report = load_pretrained(resenc_student(), str(tmp_path / "s.safetensors"))
    assert "no decoder" in report
    assert "fresh: " in report
    assert "left: 1 of projector, neither encoder nor reconstruction decoder" in report


def test_another_crop_resizes_the_position_embedding_and_channels_are_repeated(tmp_path):
    network = randomise(MaskedAutoencoder((24, 16, 32), "xyz"))
    path = nnssl_checkpoint(network, tmp_path / "mae.pth", "AlignedX", patch_size=[24, 16, 32])
    student = primus_student((16, 32, 16), num_channels=2)
    report = load_pretrained(student, path)
    assert "position embedding resized from (3, 2, 4) to (2, 4, 2) tokens" in report
    assert "input channels repeated from 1 to 2" in report
    other = MaskedAutoencoder((16, 32, 16), "xyz")
    weights = network.state_dict()
    for part in ("eva", "decoder"):
        position = weights[f"{part}.pos_embed"].transpose(1, 2).unflatten(2, (3, 2, 4))
        position = nn.functional.interpolate(position, (2, 4, 2), mode="trilinear")
        weights[f"{part}.pos_embed"] = position.flatten(2).transpose(1, 2)
    other.load_state_dict(weights)
    crop = torch.randn(1, 1, 16, 32, 16)
    ours = student.features.encoder(crop.expand(-1, 2, -1, -1, -1), stages=["stage2"]).feature_maps["stage2"]
    assert difference(ours, other.encode(crop)) < 1e-5
    student.features.encoder.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"read 2 channels, and the recipe 1: name 2 modalities.* in data\.channels"):
        load_pretrained(primus_student((16, 32, 16)), str(tmp_path / "two"))


def test_the_crop_of_our_own_runs_is_read_beside_the_weights(tmp_path):
    """An encoder of a crop that is no cube: without its config.json the position embedding could not be resized."""
    encoder = primus_student((16, 32, 24)).features.encoder
    encoder.save_pretrained(tmp_path)
    student = primus_student((24, 16, 16))
    assert "resized from (2, 4, 3) to (3, 2, 2)" in load_pretrained(student, str(tmp_path))
    crop = torch.randn(1, 1, 24, 16, 16)
    theirs = encoder.eval()(crop).last_hidden_state
    assert difference(student.features.encoder(crop).last_hidden_state, theirs) < 1e-5


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "encoder.", "module.encoder."])
def test_our_own_weights_are_known_behind_any_wrapper(prefix, tmp_path):
    encoder = primus_student().features.encoder
    torch.save({prefix + n: w for n, w in encoder.state_dict().items()}, tmp_path / "e.pth")
    student = primus_student()
    nn.init.zeros_(student.features.encoder.patch_embed.weight)
    load_pretrained(student, str(tmp_path / "e.pth"))
    assert torch.equal(student.features.encoder.patch_embed.weight, encoder.patch_embed.weight)


def test_the_plan_s_own_crop_counts_more_and_a_wrong_one_is_not_believed(tmp_path):
    network = randomise(MaskedAutoencoder((16, 16, 16), "xyz"))
    path = nnssl_checkpoint(network, tmp_path / "voco.pth", "AlignedX", patch_size=[160, 160, 160])
    assert "resized from (2, 2, 2) to (3, 3, 2)" in load_pretrained(primus_student(), path)
    content = torch.load(path, weights_only=True)
    content["nnssl_adaptation_plan"]["pretrain_patch_size"] = [32, 16, 8]
    content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"]["onemmiso"]["patch_size"] = [16, 16, 16]
    torch.save(content, path)
    assert "resized from (4, 2, 1) to (3, 3, 2)" in load_pretrained(primus_student(), path)


def test_nothing_to_load_is_an_error(tmp_path):
    torch.save({"network_weights": {"a.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="0 tensors would be loaded"):
        load_pretrained(resenc_student(), str(tmp_path / "other.pth"))


def test_the_other_architecture_and_other_sizes_are_named(tmp_path):
    resenc = nnssl_checkpoint(reference_resenc(1, RESENC), tmp_path / "resenc.pth")
    with pytest.raises(ValueError, match="weights of a resenc, our encoder is a primus"):
        load_pretrained(primus_student(), resenc)
    bigger = reference_resenc(1, {**RESENC, "hidden_sizes": [4, 8, 16]})
    with pytest.raises(ValueError, match=r"not for this encoder: .*\[16, 8, 3, 3, 3\], not \[8, 8, 3, 3, 3\].* more"):
        load_pretrained(resenc_student(), nnssl_checkpoint(bigger, tmp_path / "bigger.pth"))
    deeper = reference_resenc(1, {**RESENC, "depths": [1, 2, 1]})
    with pytest.raises(ValueError, match="is missing"):
        load_pretrained(resenc_student(), nnssl_checkpoint(deeper, tmp_path / "shallow.pth"))


# --------------------------------------------------------------------------- the script


def test_a_run_starts_from_another_run_and_its_teacher_with_it(volumes, tmp_path):
    common = ["--config", config("ddp"), "--data", volumes, *TINY]
    launch(*common, "--output", tmp_path / "first")
    first = load_file(tmp_path / "first" / "pretraining.safetensors")
    done = launch(*common, "--output", tmp_path / "second", "--init-from", tmp_path / "first", *STILL)
    assert "pretraining.safetensors: " in done.stdout
    assert "left: 6 of projector, neither encoder nor reconstruction decoder" in done.stdout
    assert "fresh: " not in done.stdout
    second = load_file(tmp_path / "second" / "pretraining.safetensors")
    prefix = "features.encoder."
    for name, tensor in second.items():
        if name.startswith("teacher." + prefix):
            assert torch.equal(tensor, first[name.replace("teacher.", "student.")]), name
        elif name.startswith("student." + prefix) and name.endswith("weight"):
            assert not torch.equal(tensor, first[name]), name
    facts = json.loads((tmp_path / "second" / "encoder" / "pretraining.json").read_text())
    weights = tmp_path / "first" / "pretraining.safetensors"
    name = f"first/pretraining.safetensors (sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()})"
    assert facts["origin"] == name
    for public in (tmp_path / "second" / "encoder").iterdir():  # no path of this machine
        assert str(tmp_path).encode() not in public.read_bytes().replace(str(tmp_path / "second").encode(), b""), public
    again = [*common, "--output", tmp_path / "second", "--resume", "auto", *STILL]
    assert "init  " not in launch(*again).stdout
    facts = json.loads((tmp_path / "second" / "encoder" / "pretraining.json").read_text())
    assert facts["origin"] == name
    encoder = json.loads((tmp_path / "second" / "encoder" / "config.json").read_text())
    assert encoder["drop_path_rate"] == 0.0  # 0.2 in the run: who fine-tunes would drop paths unasked
    other = launch(*again, "--init-from", tmp_path / "other", check=False)
    assert "the run to resume started from" in other.stderr


def test_a_revision_of_the_hub_is_asked_for_and_its_commit_told(monkeypatch, tmp_path):
    snapshot, asked = tmp_path / "models--lab--brain" / "snapshots" / "c0ffee", []
    primus_student().features.encoder.save_pretrained(snapshot)

    def listed(repo_id, revision):
        asked.append((repo_id, revision))
        return ["config.json", "model.safetensors"]

    def downloaded(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return snapshot

    monkeypatch.setattr(warm_start, "list_repo_files", listed)
    monkeypatch.setattr(warm_start, "snapshot_download", downloaded)
    for source, revision in (("lab/brain@v1.0", "v1.0"), ("lab/brain", None)):
        file = find(source)
        assert file == snapshot / "model.safetensors"
        assert asked == [("lab/brain", revision)] * 2
        assert origin(source, file) == "lab/brain@c0ffee"
        asked.clear()


def test_a_source_without_weights_is_one_line_at_the_command_line(volumes, tmp_path):
    arguments = ["--config", config("ddp"), "--data", volumes, *TINY, "--output", tmp_path / "run"]
    done = launch(*arguments, "--init-from", tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("train_cva.py: ")
    assert "Traceback" not in done.stderr


def test_several_encoders_in_one_file_are_not_guessed_at(tmp_path):
    weights = MaskedAutoencoder((24, 24, 16), "xyz").state_dict()
    both = {f"{prefix}.{name}": tensor for prefix in ("a", "b") for name, tensor in weights.items()}
    torch.save({"network_weights": both, "trainer_name": "ConMAE"}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"holds several encoders \(a\., b\.\): keep one of them"):
        load_pretrained(primus_student(), str(tmp_path / "two.pth"))


@pytest.mark.parametrize(
    ("theirs", "ours", "warned"),
    [(None, "RAS", True), (None, "SAR", False), ("RAS", "RAS", False), ("LPS", "RAS", True)],
)
def test_weights_that_saw_other_axes_are_warned_of(tmp_path, recwarn, theirs, ours, warned):
    """Those of nnssl and nnU-Net saw [Z, Y, X]; ours say in config.json what they saw."""
    student = primus_student()
    student.features.encoder.config.preprocessing = {"orientation": ours}
    if theirs:
        other = primus_student().features.encoder
        other.config.preprocessing = {"orientation": theirs}
        other.save_pretrained(tmp_path)
    else:
        torch.save({"network_weights": MaskedAutoencoder((24, 24, 16), "xyz").state_dict()}, tmp_path / "foreign.pth")
    load_pretrained(student, str(tmp_path if theirs else tmp_path / "foreign.pth"), None if theirs else "xyz")
    words = [str(warning.message) for warning in recwarn if "along the axes" in str(warning.message)]
    assert len(words) == warned
    if warned:
        assert f"set data.orientation={theirs or 'SAR'}" in words[0]
