"""From each kind of source through prepare_data.py and train_cva.py to an encoder."""

import json

import datasets
import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY, blobs, config, launch, save_nifti
from test_prepare import rows
from test_prepare_data import script

from data.demo import demo_volume
from data.manifest import read_manifest
from models import load_encoder
from training.export import processor

CT = ["data.intensity_of_ct={rule: window, low: -1000, high: 1000, mean: 0, std: 500}"]
NIBABEL = ("anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "functional.nii")


def template(folder):
    (folder / "heads").mkdir(parents=True)
    (folder / "heads" / demo_volume().name).symlink_to(demo_volume())
    for name in NIBABEL:
        (folder / name).symlink_to(ROOT.joinpath(nib.__path__[0], "tests", "data", name))
    return folder, [], ["data.max_bad_share=0.9"], 2  # one volume of nibabel's is 3D


def bids(folder):
    for subject in ("01", "02"):
        for modality in ("T1w", "FLAIR"):
            name = f"sub-{subject}_ses-1_{modality}.nii.gz"
            save_nifti(folder / f"sub-{subject}" / "ses-1" / "anat" / name, blobs(int(subject)))
        mask = folder / "derivatives" / f"sub-{subject}" / f"sub-{subject}_T1w.nii.gz"
        save_nifti(mask, blobs(7))
    return folder, [], [], 4


def decathlon(folder):
    for number in range(3):
        save_nifti(folder / "imagesTr" / f"case_{number}.nii.gz", blobs(number))
        save_nifti(folder / "labelsTr" / f"case_{number}.nii.gz", (blobs(number) > 600).astype(np.uint8))
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}}))
    return folder, ["--labels", folder / "labelsTr"], [], 3


def nnssl(folder):
    paths = [save_nifti(folder / "raw" / f"{number}.nii.gz", blobs(number)) for number in range(3)]
    sets = {}
    for number, path in enumerate(paths):
        sessions = {"a": {"images": [{"image_path": str(path), "modality": "T1w"}]}}
        sets[str(number)] = {"subjects": {f"s{number}": {"sessions": sessions}}}
    content = {"collection_index": 1, "collection_name": "c", "datasets": sets}
    (folder / "pretrain_data.json").write_text(json.dumps(content))
    return folder / "pretrain_data.json", [], [], 3


def hub(folder):
    """A data set with a column of volumes, as the Hub streams it, in two files of rows."""
    features = datasets.Features({"scan": datasets.Nifti(), "subject": datasets.Value("string")})
    folder.mkdir()
    for part in range(2):
        of = [save_nifti(folder.parent / f"{part}{number}.nii.gz", blobs(10 * part + number)) for number in range(2)]
        table = [{"scan": {"path": path.name, "bytes": path.read_bytes()}, "subject": path.name[:2]} for path in of]
        datasets.Dataset.from_list(table, features).to_parquet(folder / f"train-{part:05}-of-00002.parquet")
    return folder, [], [], 4


def ct(folder):
    for number in range(3):
        body = np.clip(blobs(number) - 400, -1000, 1500)
        body[:, :8] = -1000  # air
        save_nifti(folder / f"{number}.nii.gz", body.astype(np.int16))
    return folder, [], CT, 3


def channels(folder):
    """Three patients with two registered contrasts, of whom one has only the first."""
    for subject in range(3):
        for modality in ("T1w", "FLAIR")[: 1 if subject == 2 else 2]:
            path = folder / f"sub-{subject}" / "anat" / f"sub-{subject}_{modality}.nii.gz"
            save_nifti(path, blobs(subject) if modality == "T1w" else 2000 - blobs(subject))
    return folder, [], ["data.channels=[T1w,FLAIR]"], 5


def slices(folder):
    """Of 4 mm, in another plane each."""
    for number, spacing in enumerate([(1.0, 1.0, 4.0), (1.0, 4.0, 1.0), (4.0, 1.0, 1.0)]):
        save_nifti(folder / f"{number}.nii.gz", blobs(number, tuple(round(44 / mm) for mm in spacing)), spacing)
    return folder, [], ["data.spacing=native"], 3


THIN = ["views.crop_size=[32,32,12]", "views.cells=[3,3,1]", "views.coarsest_last=true", "model.patch_size=4"]


@pytest.mark.slow
@pytest.mark.parametrize("source", [template, bids, decathlon, nnssl, hub, ct, channels, slices])
def test_a_source_becomes_an_encoder(source, tmp_path):
    place, arguments, numbers, count = source(tmp_path / "data")
    preparing = [place, "--output", tmp_path / "ready", *arguments, "data.spacing=[1,1,1]", *numbers]
    done = [script(*preparing, "--shard", f"{number}/2") for number in range(2)]
    assert "not yet" in done[0].stdout, done[0].stderr
    assert f"prepared    {count} volumes" in done[1].stdout, done[1].stderr
    assert (tmp_path / "ready" / "report" / "volumes.png").exists()
    found = [row for row in rows(tmp_path / "ready").values() if row["reason"] is None]
    if source is decathlon:
        assert all((tmp_path / "ready" / row["label"]).exists() for row in found)
    if source in (bids, nnssl, hub, decathlon):
        assert len({row["subject"] for row in found}) == {bids: 2}.get(source, count)
    if source is ct:
        assert {row["modality"] for row in found} == {"CT"}
        assert all(row["padding"] == -2 for row in found)
    common = ["--config", config("ddp"), "--data", tmp_path / "ready", "--output", tmp_path / "run", *TINY]
    trained = launch(*common, *numbers, *([*THIN, "mask.block=4"] if source is slices else []))
    assert f"data        {count} volumes" in trained.stdout
    facts = json.loads((tmp_path / "run" / "encoder" / "pretraining.json").read_text())
    assert facts["data"] == read_manifest(tmp_path / "ready").fingerprint()
    encoder = load_encoder(tmp_path / "run" / "encoder")
    images = [place / row["source"] for row in found] if place.is_dir() and source is not hub else []
    for image in [{"T1w": path} for path in images if "T1w" in path.name] if source is channels else images:
        crop = processor(encoder.config)(image)["pixel_values"]
        assert crop.shape == (1, encoder.config.num_channels, *encoder.config.image_size)
        assert encoder(crop).last_hidden_state.isfinite().all()
