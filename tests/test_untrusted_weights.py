"""Weights from anywhere: what could run code, leave its folder or is damaged is refused in one line."""

import contextlib
import json
import os
import pickle
from functools import partial

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from test_reference import reference_resenc
from test_warm_start import RESENC, nnssl_checkpoint, primus_student, resenc_student

from models import warm_start
from models.warm_start import load_pretrained


class Attack:
    """Runs a command where a pickle of it is loaded."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(how, tmp_path):
    witness, path = tmp_path / "was_here", tmp_path / "evil.pth"
    content = {"network_weights": reference_resenc(1, RESENC).state_dict(), "logging": Attack(witness)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content["logging"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ValueError, match="refused"):
        load_pretrained(resenc_student(), str(path))
    assert not witness.exists()


def test_a_path_that_climbs_out_of_the_folder_is_refused(tmp_path):
    secret = tmp_path / "elsewhere.safetensors"
    save_file({"stem.conv.weight": torch.zeros(1)}, secret)
    folder = tmp_path / "encoder"
    folder.mkdir()
    index = {"weight_map": {"stem.conv.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names \.\./elsewhere.safetensors, .* refused"):
        load_pretrained(resenc_student(), str(folder))
    for index in (
        {"weight_map": {"a": "model.safetensors.index.json"}},
        {"weight_map": {"a": 3}},
        {},
        {"weight_map": []},
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            load_pretrained(resenc_student(), str(folder))


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x03\x04 no", b"{}"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_damaged_file_is_named(content, suffix, tmp_path):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged.{suffix}"):
        load_pretrained(resenc_student(), str(path))


@pytest.mark.parametrize(
    "content",
    [
        {"model": "a name"},
        {"network_weights": [1, 2]},
        {"network_weights": {1: torch.zeros(2)}},
        {"network_weights": {"a": torch.zeros(2)}, "nnssl_adaptation_plan": []},
        {"trainer_name": 3, "nnssl_adaptation_plan": {"pretrain_plan": {"configurations": [1]}}},
    ],
)
def test_a_checkpoint_of_another_shape_is_one_line(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="0 tensors would be loaded"):
        load_pretrained(resenc_student(), str(tmp_path / "odd.pth"))


def test_a_checkpoint_with_flipped_bits_is_named_or_read(tmp_path):
    path = nnssl_checkpoint(reference_resenc(1, RESENC), tmp_path / "x.pth")
    good = (tmp_path / "x.pth").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        damaged = bytearray(good)
        for place in torch.randint(len(good), (20,), generator=generator).tolist():
            damaged[place] ^= 0x55
        (tmp_path / "x.pth").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            load_pretrained(resenc_student(), path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = reference_resenc(1, RESENC)
    network.encoder.stages[0].blocks[0].conv1.conv.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="is not finite"):
        load_pretrained(resenc_student(), nnssl_checkpoint(network, tmp_path / "nan.pth"))


@pytest.mark.parametrize("source", ["no/such/folder/at_all", "../x", "not a hub id", "runs/typo"])
def test_a_source_that_does_not_exist_is_named(source, monkeypatch, tmp_path):
    monkeypatch.setattr(warm_start, "list_repo_files", offline)
    nothing_cached = partial(snapshot_download, cache_dir=tmp_path)
    monkeypatch.setattr(warm_start, "snapshot_download", nothing_cached)
    with pytest.raises(ValueError, match="no such file or folder"):
        load_pretrained(resenc_student(), source)


def offline(*arguments, **options):
    raise RuntimeError("no network")


def test_without_a_network_what_was_downloaded_before_is_used_and_said(monkeypatch, tmp_path):
    primus_student().features.encoder.save_pretrained(tmp_path)
    monkeypatch.setattr(warm_start, "list_repo_files", offline)
    monkeypatch.setattr(warm_start, "snapshot_download", lambda repo_id, revision, local_files_only: tmp_path)
    with pytest.warns(UserWarning, match="lab/brain: the Hub did not give it .no network.*downloaded before"):
        load_pretrained(primus_student(), "lab/brain")
