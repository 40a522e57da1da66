"""Contrasts of one patient as the channels of one sample."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import blobs, prepared, save_nifti
from test_prepare import rows
from test_stream import make_stream

from data.channels import group_channels
from data.image_processing_volume import VolumeImageProcessor
from data.manifest import read_manifest
from data.sources import Source
from data.split import split_by_subject
from data.store import PreparedVolumes
from data.stream import render, stack_views

CHANNELS = ("T1w", "FLAIR")


def contrast(subject, modality):
    """Of another brightness, and of another box, than the same patient's other contrast."""
    volume = np.zeros((40, 44, 36), np.int16)
    first = 3 if modality == "T1w" else 6
    volume[first:-2, 4:-first, 2:-2] = blobs(subject)[first:-2, 4:-first, 2:-2]
    return volume if modality == "T1w" else 3 * volume


def scan(folder, subject, modality):
    return folder / f"sub-{subject}" / "anat" / f"sub-{subject}_{modality}.nii.gz"


@pytest.fixture
def study(tmp_path):
    """Four patients: both contrasts; both, and a third one; T1w alone; FLAIR alone."""
    folder = tmp_path / "study"
    for subject, there in enumerate([CHANNELS, (*CHANNELS, "T2w"), ("T1w",), ("FLAIR",)]):
        for modality in there:
            save_nifti(scan(folder, subject, modality), contrast(subject, modality))
    return folder


@pytest.fixture
def ready(study, tmp_path):
    return prepared(study, tmp_path / "ready", channels=CHANNELS)


def test_contrasts_of_a_session_are_one_sample_on_one_grid(study, ready, tmp_path):
    assert len(ready) == 4
    assert [volume.present.tolist() for volume in ready] == [[True, True], [True, True], [True, False], [False, True]]
    both = ready[0][:, :, :]
    assert both.shape == (2, 35, 37, 32)  # of the larger box
    for channel, modality in zip(both, CHANNELS):
        cut = contrast(0, modality)[3:-2, 4:-3, 2:-2].astype(np.float64)
        np.testing.assert_allclose(channel, (cut - cut.mean()) / cut.std(), atol=3e-3)
    alone = ready[2][:, :, :]
    assert not alone[1].any()
    assert alone[0].any()
    found = rows(tmp_path / "ready")
    assert found["sub-1/anat/sub-1_T2w.nii.gz"]["reason"] == "its modality is not one of data.channels"
    assert len({row["case"] for row in found.values() if row["subject"] == "0"}) == 1
    assert ready.several_subjects
    assert ready.subjects.tolist() == [0, 1, 2, 3]


def test_a_crop_of_channels_is_the_crop_of_each(ready):
    """Blocks, mirrors, turns and paddings are those of volumes by themselves."""
    stream = make_stream(ready, 7, crop_size=(32, 16, 24))
    samples = stack_views([stream[i] for i in range(8)])
    assert {tuple(row) for row in samples["present"].tolist()} == {(True, True), (True, False), (False, True)}
    batch = render(samples, torch.device("cpu"), (32, 16, 24), "linear", "clean")
    assert batch["views"].shape == batch["target"].shape == (16, 2, 32, 16, 24)
    assert not batch["views"][~samples["present"]].any()  # no noise where there is nothing
    assert not batch["target"][~samples["present"]].any()
    for channel in range(2):
        single = {**samples, "block": [block[channel : channel + 1] for block in samples["block"]]}
        single |= {key: samples[key][:, channel : channel + 1] for key in ("present", "padding")}
        alone = render(single, torch.device("cpu"), (32, 16, 24), "linear", "clean")
        assert torch.equal(alone["target"][:, 0], batch["target"][:, channel])


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_channels_with_paddings_of_their_own(tmp_path, interpolation):
    for modality in CHANNELS:
        save_nifti(scan(tmp_path / "study", 0, modality), contrast(0, modality) + 7)
    ready = prepared(tmp_path / "study", tmp_path / "ready", channels=CHANNELS, intensity={"rule": "foreground"})
    stream = make_stream(ready, 7, crop_size=(48, 48, 48), intensity={}, interpolation=interpolation)
    samples = stack_views([stream[i] for i in range(4)])
    views = render(samples, torch.device("cpu"), (48, 48, 48), interpolation, "augmented")["views"]
    paddings, last = ready[0].padding, np.array(ready[0].shape) - 1
    assert paddings[0] != paddings[1]
    grid = np.stack(np.meshgrid(*[np.arange(48)] * 3, indexing="ij"), axis=-1)
    for view, affine in zip(views, samples["crop_to_volume"].numpy()):
        places = grid @ affine[:, :3].T + affine[:, 3]
        beyond = ((places < -1.01) | (places > last + 1.01)).any(-1)
        assert beyond.any()
        for channel, padding in zip(view, paddings):
            assert (channel.numpy()[beyond] == np.float32(padding)).all()


def test_what_is_not_on_the_grid_of_the_first_is_left_out(study, tmp_path):
    moved = nib.Nifti1Image(contrast(0, "FLAIR"), np.diag([1, 1, 1.5, 1]))
    nib.save(moved, scan(study, 0, "FLAIR"))
    scan(study, 1, "FLAIR").write_bytes(b"no image")
    ready = prepared(study, tmp_path / "ready", channels=CHANNELS)
    found = rows(tmp_path / "ready")
    assert "not on the grid of sub-0/anat/sub-0_T1w.nii.gz" in found["sub-0/anat/sub-0_FLAIR.nii.gz"]["reason"]
    assert found["sub-1/anat/sub-1_FLAIR.nii.gz"]["is_bad"]
    assert [volume.present.tolist() for volume in ready] == [[True, False]] * 3 + [[False, True]]


def test_what_rounding_tells_apart_is_one_grid(tmp_path):
    """41 voxels of 0.5 mm are 20 or 21 of 1 mm, by the last digit of the header."""
    for modality, mm in (("T1w", 0.5), ("FLAIR", 0.50000006)):
        save_nifti(scan(tmp_path / "study", 0, modality), blobs(0, (41, 41, 41)), (mm, mm, mm))
    (volume,) = prepared(tmp_path / "study", tmp_path / "ready", channels=CHANNELS)
    assert volume[:, :, :].shape == (2, *volume.shape)
    processor = VolumeImageProcessor(channels=CHANNELS)
    images = {modality: scan(tmp_path / "study", 0, modality) for modality in CHANNELS}
    assert processor.prepare(images).shape == (2, *volume.shape)


def test_a_contrast_that_is_added_changes_its_patient_alone(study, ready, tmp_path):
    before = {name: row["file"] for name, row in rows(tmp_path / "ready").items()}
    save_nifti(scan(study, 2, "FLAIR"), 2 * contrast(2, "T1w"))
    again = prepared(study, tmp_path / "ready", channels=CHANNELS)
    after = {name: row["file"] for name, row in rows(tmp_path / "ready").items()}
    assert {name for name in before if before[name] != after[name]} == {"sub-2/anat/sub-2_T1w.nii.gz"}
    assert again[2].present.all()


def test_a_channel_that_is_gone_is_prepared_again(study, ready):
    whole = ready[1][:, :, :]
    for path in sorted(ready.manifest.folder.glob("volumes/*/sub-1_*.npy")):
        content = path.read_bytes()
        path.unlink()
        assert np.array_equal(ready.read([1], lambda volumes: volumes[0][:, :, :]), whole)
        assert path.read_bytes() == content


def test_groups_are_of_subject_and_session():
    def source(path, subject, session, modality):
        return Source(path, "study", subject, session, modality)

    found = [
        source("a", "1", "1", "T1w"),
        source("b", "1", "2", "flair"),
        source("c", "1", "1", "t1W"),
        source("d", "1", "1", "FLAIR"),
        source("e", "", "", "T1w"),
        source("f", "2", "", "T2w"),
    ]
    cases, left_out = group_channels(found, CHANNELS)
    assert [[one.path for one in case] for case in cases] == [["a", "d"], ["b"]]
    assert {path: reason.split(",")[0] for path, reason in left_out} == {
        "c": "a second one of its modality",
        "e": "no subject is known",
        "f": "its modality is not one of data.channels",
    }
    assert group_channels(found, ()) == ([(one,) for one in found], [])
    with pytest.raises(
        ValueError, match=r"no volume is PD; there are T1w \(1\), flair \(1\), .*T2w \(1\)\. Name those there, or \[\]"
    ):
        group_channels(found, ("T1w", "PD"))


def test_subjects_stay_together_when_they_are_split(tmp_path):
    for subject in range(20):
        for modality in CHANNELS[: 1 + subject % 2]:
            save_nifti(scan(tmp_path / "study", f"{subject:02}", modality), contrast(subject, modality))
    prepared(tmp_path / "study", tmp_path / "ready", channels=CHANNELS)
    manifest = read_manifest(tmp_path / "ready")
    split = split_by_subject(manifest, 0.1, [])
    parts = (split.training, split.validation)
    training, validation = (PreparedVolumes(manifest, part, draw="subjects") for part in parts)
    assert (len(training), len(validation)) == (18, 2)
    assert sum(volume.present.sum() for part in (training, validation) for volume in part) == 30


def test_labels_are_those_of_all_channels(tmp_path):
    for case in range(2):
        for channel, modality in enumerate(CHANNELS):
            save_nifti(tmp_path / "task" / "imagesTr" / f"case_{case}_{channel:04}.nii.gz", contrast(case, modality))
        lesion = (contrast(case, "T1w") > 500).astype(np.uint8)
        save_nifti(tmp_path / "task" / "labelsTr" / f"case_{case}.nii.gz", lesion)
    (tmp_path / "task" / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1w", "1": "FLAIR"}}))
    labels = tmp_path / "task" / "labelsTr"
    ready = prepared(tmp_path / "task", tmp_path / "ready", channels=CHANNELS, labels=labels)
    found = [row for row in rows(tmp_path / "ready").values() if row["file"]]
    assert len(found) == 4
    assert len({row["label"] for row in found}) == 2
    for row in found:
        assert np.load(tmp_path / "ready" / row["label"]).shape == tuple(row["shape"]) == ready[0].shape


def test_the_processor_gives_what_was_trained_on(study, ready, tmp_path):
    processor = VolumeImageProcessor(crop_size=(24, 24, 24), channels=CHANNELS)
    processor.save_pretrained(tmp_path / "processor")
    processor = VolumeImageProcessor.from_pretrained(tmp_path / "processor")
    images = {modality: scan(study, 0, modality) for modality in CHANNELS}
    assert np.array_equal(processor.prepare(images).astype(np.float16), ready[0][:, :, :])
    missing = {"flair": scan(study, 3, "FLAIR")}
    assert np.array_equal(processor.prepare(missing).astype(np.float16), ready[3][:, :, :])
    assert processor([images, missing])["pixel_values"].shape == (2, 2, 24, 24, 24)
    for wrong in (scan(study, 0, "T1w"), {"PD": scan(study, 0, "T1w")}, {"T1w": None}, {}):
        with pytest.raises(ValueError, match=r"reads channels: give \{'T1w': \.\.\., 'FLAIR': \.\.\.\}"):
            processor(wrong)
    other = save_nifti(tmp_path / "other.nii.gz", blobs(0, (20, 20, 20)))
    moved = nib.load(scan(study, 0, "T1w"))
    moved = nib.Nifti1Image(moved.dataobj, moved.affine + np.eye(4, k=3) * 50)
    for wrong in (other, moved):
        with pytest.raises(ValueError, match="on one grid"):
            processor({"T1w": wrong, "FLAIR": scan(study, 0, "FLAIR")})
