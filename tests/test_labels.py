"""Maps of labels: prepared, streamed on the affine of their views, checked before they are learned from."""

import json
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, blobs, prepared, save_nifti

from data.labels import (
    CLASSES,
    Classes,
    classes_of,
    counts_in_words,
    draw_labelled_view,
    find_places,
    keep_classes,
    labelled_rows,
    places_of,
    read_classes,
)
from data.manifest import FOR_RUNS, LABELS, NAME, Preparation, read_manifest
from data.prepare_folder import prepare_folder
from data.prepare_volume import Job
from data.sources import NO_LABEL, find_sources, labels_beside, only_labelled
from data.split import choose_subjects
from data.store import PreparedVolumes
from data.stored_volume import HeldVolume
from data.stream import SampleStream, render, stack_views
from data.views import scatter_views
from training.preparation import open_manifest, prepare_data
from training.recipe import load_data_section

STILL = {
    "mirror": 0.0,
    "rotation": {"probability": 0.0, "degrees": (0.0,) * 3},
    "zoom": {"probability": 0.0, "range": (1, 1)},
}
TURNS = {
    "mirror": STILL | {"mirror": 1.0},
    "rotation": STILL | {"rotation": {"probability": 1.0, "degrees": (30.0, 30.0, 30.0)}},
    "zoom": STILL | {"zoom": {"probability": 1.0, "range": (0.7, 1.4)}},
}
CROP = (16, 12, 20)
SHAPE = (40, 30, 36)


def stream_of(volumes, draw=None, turn=STILL, **changes):
    anywhere = lambda rng, volumes, shared, own: scatter_views(rng, volumes[0].shape, CROP, 0.0, shared, own)  # noqa: E731
    numbers = {"coarsest_last": False, "interpolation": "linear", "shared": STILL, "independent": turn, "intensity": {}}
    numbers |= {"views": 1, "labels": True, "draw": draw or anywhere} | changes
    return SampleStream(volumes, 0, CROP, **numbers)


def batch_of(stream, count=4):
    return render(
        stack_views([stream[i] for i in range(count)]), torch.device("cpu"), CROP, stream.interpolation, "clean"
    )


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_labels_lie_where_the_voxels_of_their_view_lie(turn, axis, interpolation):
    """The image is a coordinate, the label which side of a plane it is on: they part half a voxel from it at most."""
    coordinate = np.broadcast_to(
        np.expand_dims(np.arange(SHAPE[axis], dtype=np.float32), [a for a in range(3) if a != axis]), SHAPE
    )
    plane = SHAPE[axis] // 2 - 0.5
    volume = HeldVolume(coordinate.copy(), labels=(coordinate > plane).astype(np.uint8) + 1)
    batch = batch_of(stream_of([volume], turn=TURNS[turn], interpolation=interpolation), 6)
    labels, places = batch["labels"], batch["views"][:, 0]
    assert labels.shape == (6, *CROP)
    assert labels.dtype == torch.int64
    inside, sure = labels > 0, (places - plane).abs() > 0.5 + 1e-3
    # beyond half a voxel within the border, interpolation mixes the coordinate with what is around the volume
    grid = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in CROP), indexing="ij"), -1)
    at = (
        torch.einsum("nij,xyzj->nxyzi", batch["crop_to_volume"][:, :, :3], grid)
        + batch["crop_to_volume"][:, None, None, None, :, 3]
    )
    within = ((at > 0) & (at < torch.tensor(SHAPE) - 1)).all(-1)
    assert inside[within].all()
    assert not inside[((at < -0.51) | (at > torch.tensor(SHAPE) - 0.49)).any(-1)].any()
    checked = within & sure
    assert checked.float().mean() > 0.5
    assert torch.equal(labels[checked] == 2, (places > plane)[checked])
    assert len(labels[checked].unique()) == 2


def test_labels_change_nothing_else_and_intensity_changes_no_labels():
    volume = HeldVolume(blobs(0, SHAPE).astype(np.float32), labels=(blobs(1, SHAPE) > 500).astype(np.uint16) * 300)
    plain = batch_of(stream_of([volume], turn=TURNS["rotation"], labels=False))
    labelled = batch_of(stream_of([volume], turn=TURNS["rotation"]))
    bright = batch_of(stream_of([volume], turn=TURNS["rotation"], intensity={"brightness": (1.0, (0.5, 1.5))}))
    assert labelled.keys() == plain.keys() | {"labels"}
    assert all(torch.equal(plain[key], labelled[key]) for key in plain)
    assert torch.equal(bright["labels"], labelled["labels"])
    assert not torch.equal(bright["views"], labelled["views"])
    assert labelled["labels"].unique().tolist() == [0, 300]


def test_a_mask_is_drawn_only_if_asked_for():
    volume = HeldVolume(blobs(0, SHAPE).astype(np.float32))
    masked, bare = (
        batch_of(stream_of([volume], labels=False, **mask)) for mask in ({"mask_block": 4, "mask_ratio": 0.5}, {})
    )
    assert masked["mask"].shape == (4, 4, 3, 5)
    assert bare.keys() == masked.keys() - {"mask"}
    assert all(torch.equal(bare[key], masked[key]) for key in bare)


def labels_of(seed, shape=SHAPE):
    return (blobs(seed, shape) > 400).astype(np.uint8) + (blobs(seed, shape) > 700)


def decathlon(folder, cases=3, names=None, contrasts=("",)):
    """Volumes with labels as nnU-Net has them."""
    for case in range(cases):
        for contrast in contrasts:
            save_nifti(folder / "imagesTr" / f"case_{case:02}{contrast}.nii.gz", blobs(case, SHAPE))
        save_nifti(folder / "labelsTr" / f"case_{case:02}.nii.gz", labels_of(case))
    names = names or {"background": 0, "organ": 1, "tumour": 2}
    about = {"channel_names": {"0": "T1", "1": "T2"}, "labels": names}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [(), ("T1", "T2")])
def test_labels_of_the_store_are_those_of_the_files(tmp_path, packed, channels):
    """On the grid of their volume, one map for all channels, also where the volume was cropped and resampled."""
    folder = decathlon(tmp_path / "task", contrasts=("_0000", "_0001") if channels else ("_0000",))
    labels = labels_beside(folder)
    volumes = prepared(folder, tmp_path / "ready", labels=labels, packed=packed, channels=channels)
    assert len(volumes) == 3
    for number, volume in enumerate(volumes):
        assert volume.labels.shape == volume.shape
        row = volumes.manifest.volumes["label_values"][volumes.rows_of(number)[0]].as_py()
        assert row == np.unique(volume.labels[:, :, :]).tolist() == [0, 1, 2]
        assert np.array_equal(volume.labels[3:9, :, 5:6], labels_of(number)[3:9, :, 5:6])
    batch = batch_of(stream_of(volumes))
    assert batch["views"].shape[1] == max(1, len(channels))
    assert batch["labels"].shape == (4, *CROP)


def test_a_sample_is_a_function_of_its_number_wherever_labels_are_kept(tmp_path):
    folder = decathlon(tmp_path / "task")
    draw = partial(draw_labelled_view, crop_size=CROP, foreground_share=0.5)
    parts = []
    for packed in (False, True):
        volumes = prepared(folder, tmp_path / f"ready{packed}", labels=labels_beside(folder), packed=packed)
        batches = [batch_of(stream_of(volumes, draw, turn=TURNS["zoom"])) for _ in range(2)]
        parts += [batch["labels"] for batch in batches]
    assert all(torch.equal(part, parts[0]) for part in parts)


def test_labels_that_are_gone_are_named(tmp_path):
    folder = decathlon(tmp_path / "task")
    volumes = prepared(folder, tmp_path / "ready", labels=labels_beside(folder))
    gone = volumes[0].label_file
    gone.unlink()
    unreadable = [line for i in range(8, 12) for line in stream_of(volumes)[i]["unreadable"]]
    assert unreadable
    assert all(f"{gone} cannot be read" in line for line in unreadable)


def test_each_class_is_shown_as_often_inside_the_volume():
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, 0, 0], labels[30:, :20, 10:30], labels[39, 29, 35] = 3, 5, 9
    volume = HeldVolume(np.zeros(SHAPE, np.float32), labels=labels)
    still = np.eye(3)
    always, never, third = (
        partial(draw_labelled_view, volumes=[volume], shared=still, own=[still], crop_size=CROP, foreground_share=share)
        for share in (1.0, 0.0, 1 / 3)
    )
    rng, shown = np.random.default_rng(0), []
    for _ in range(300):
        (affine,) = always(rng)
        low = affine[:, 3].astype(int)
        assert np.array_equal(low, affine[:, 3])
        assert (low >= 0).all()
        assert (low + CROP <= SHAPE).all()
        crop = labels[tuple(slice(a, a + n) for a, n in zip(low, CROP))]
        (here,) = {3, 9} & set(np.unique(crop)) or {5}
        shown.append(here)
        assert (crop == here).any()
    counts = np.array([shown.count(value) for value in (3, 5, 9)])
    assert counts.min() > 70
    anywhere = [never(np.random.default_rng(i)) for i in range(300)]
    agree = np.mean([np.array_equal(third(np.random.default_rng(i)), a) for i, a in enumerate(anywhere)])
    assert 0.57 < agree < 0.77  # chances of one do not move the rest
    empty = HeldVolume(np.zeros(SHAPE, np.float32), labels=np.zeros(SHAPE, np.uint8))
    assert np.array_equal(always(np.random.default_rng(5), volumes=[empty]), anywhere[5])


def test_a_crop_around_a_voxel_has_it_in_the_middle_and_a_small_volume_is_centred():
    labels = np.zeros((40, 40, 12), np.uint8)
    labels[20, 17, 3] = 1
    volume = HeldVolume(np.zeros(labels.shape, np.float32), labels=labels)
    mirrored = np.diag((-1.0, 1.0, 1.0))
    arguments = {"shared": np.eye(3), "crop_size": (16, 16, 16), "foreground_share": 1.0}
    (upright,) = draw_labelled_view(np.random.default_rng(0), [volume], own=[np.eye(3)], **arguments)
    assert upright[:, 3].tolist() == [12, 9, -2]
    (turned,) = draw_labelled_view(np.random.default_rng(0), [volume], own=[mirrored], **arguments)
    centre = np.array((7.5, 7.5, 7.5))
    assert np.allclose(to_volume_of(turned, centre), to_volume_of(upright, centre))


def to_volume_of(affine, point):
    return affine[:, :3] @ point + affine[:, 3]


def test_places_of_classes_are_spread_and_few():
    labels = np.zeros((64, 64, 64), np.int32)
    labels[8:56], labels[30, 30, 30], labels[2] = 70000, 4, 9
    places = find_places(labels)
    assert [int(labels[tuple(place[0])]) for place in places] == [4, 9, 70000]
    assert all((labels[tuple(place.T)] == labels[tuple(place[0])]).all() for place in places)
    assert [len(place) for place in places][:2] == [1, 4096]
    assert 9000 < len(places[2]) <= 10000
    assert np.ptp(places[2][:, 0]) >= 46
    assert find_places(np.zeros((4, 4, 4), np.uint8)) == []


def test_a_map_is_read_once(tmp_path, monkeypatch):
    folder = decathlon(tmp_path / "task", cases=1)
    volumes = prepared(folder, tmp_path / "ready", labels=labels_beside(folder))
    first = places_of(volumes[0])
    monkeypatch.setattr("data.labels.find_places", None)
    assert places_of(volumes[0]) is first
    assert len(first) == 2


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"background": 0, "liver": 1, "tumour": 2}, (("background", "liver", "tumour"), (0, 1, 2))),
        ({"0": "background", "2": "tumour", "1": "liver"}, (("background", "liver", "tumour"), (0, 1, 2))),
        ({"hippocampus": 17}, (("background", "hippocampus"), (0, 17))),
        ({"background": 0, "whole": [1, 2], "core": 2}, "whole is a region of several labels"),
        ({"a": 1, "b": 1}, "two of its labels have one number"),
        ({"a": -1}, "or one is negative"),
        ({"a": "x"}, "must be whole numbers"),
        ({"a": 1, "ignore": 2}, "to be ignored is not supported"),
        ({}, "names no labels"),
        ([1, 2], "names no labels"),
    ],
)
def test_classes_are_named_as_nnunet_or_as_the_decathlon_does(tmp_path, labels, expected):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": labels}))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            read_classes(path)
    else:
        assert read_classes(path) == Classes(*expected)


def test_labels_become_classes_without_gaps():
    classes = Classes(("background", "a", "b"), (0, 17, 53))
    assert classes.lookup()[torch.tensor([0, 53, 17, 17])].tolist() == [0, 2, 1, 1]


def ready(folder, tmp_path, **how):
    """The manifest of a folder with labels, as a run prepares it."""
    labels = labels_beside(folder)
    listing = only_labelled(find_sources(folder, labels=labels))
    job = Job(tmp_path / "ready", listing.root, Preparation("RAS", (1.0, 1.0, 1.0), **how), labels=labels)
    keep_classes(folder, labels, job.folder)
    prepare_folder(listing, job, 1)
    return read_manifest(job.folder, (*FOR_RUNS, *LABELS))


def test_classes_and_counts_of_a_prepared_folder(tmp_path):
    folder = decathlon(tmp_path / "task", cases=4, names={"0": "background", "1": "organ", "2": "tumour", "3": "cyst"})
    save_nifti(folder / "labelsTr" / "case_01.nii.gz", np.zeros(SHAPE, np.uint8))
    save_nifti(folder / "labelsTr" / "case_02.nii.gz", (labels_of(2) > 0).astype(np.float32))
    manifest = ready(folder, tmp_path)
    rows = labelled_rows(manifest)
    assert rows.tolist() == [0, 1, 2, 3]
    classes = classes_of(manifest, rows)
    assert classes == Classes(("background", "organ", "tumour", "cyst"), (0, 1, 2, 3))
    with pytest.warns(UserWarning, match="no training volume has cyst: nothing can be learned of it"):
        assert counts_in_words(manifest, rows, classes) == "4 maps: organ 3, tumour 2, cyst 0; 1 empty"
    with (
        pytest.warns(UserWarning, match="only one of 3 training volumes has tumour"),
        pytest.warns(UserWarning, match="no training volume has cyst"),
    ):
        counts_in_words(manifest, [0, 1, 2], classes)
    (manifest.folder / CLASSES).unlink()
    assert classes_of(manifest, rows) == Classes(("background", "1", "2"), (0, 1, 2))
    assert manifest.fingerprint(labels=True) != manifest.fingerprint()


def test_channels_of_a_sample_count_once(tmp_path):
    folder = decathlon(tmp_path / "task", contrasts=("_0000", "_0001"))
    manifest = ready(folder, tmp_path, channels=("T1", "T2"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = labelled_rows(manifest)
        assert counts_in_words(manifest, rows, classes_of(manifest, rows)) == "3 maps: organ 3, tumour 3"


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (np.full(SHAPE, 0.5, np.float32), "its labels are not whole numbers"),
        (np.full(SHAPE, np.nan, np.float32), "its labels are not whole numbers"),
        (np.full(SHAPE, -1, np.int16), "its labels go from -1 to -1, not from 0"),
        (np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE), "43200 different labels: is it an image?"),
        (np.zeros((9, 9, 9), np.uint8), "it has (9, 9, 9) voxels placed otherwise than the image's (40, 30, 36)"),
    ],
)
def test_what_is_no_map_of_labels_is_said_of_its_volume(tmp_path, label, reason):
    folder = decathlon(tmp_path / "task")
    save_nifti(folder / "labelsTr" / "case_01.nii.gz", label)
    manifest = ready(folder, tmp_path)
    (row,) = (row for row in manifest.rejected.to_pylist() if row["is_bad"])
    assert row["source"] == "imagesTr/case_01.nii.gz"
    assert row["reason"].startswith("its label map case_01.nii.gz: ")
    assert reason in row["reason"]
    assert len(labelled_rows(manifest)) == 2


def test_images_without_labels_are_counted(tmp_path):
    folder = decathlon(tmp_path / "task")
    (folder / "labelsTr" / "case_01.nii.gz").unlink()
    without = "1 volumes have no labels and are left out, such as imagesTr/case_01"
    chosen = ready(folder, tmp_path)
    with pytest.warns(UserWarning, match=without):
        assert len(labelled_rows(chosen)) == 2
    all_of_them = prepared(folder, tmp_path / "all", labels=labels_beside(folder)).manifest
    with pytest.warns(UserWarning, match=without):
        assert labelled_rows(all_of_them).tolist() == [0, 2]
    bare = prepared(folder, tmp_path / "bare").manifest
    with pytest.raises(ValueError, match="none of its 3 volumes has labels; run"):
        labelled_rows(bare)


def test_labels_that_are_not_named_are_refused(tmp_path):
    manifest = ready(decathlon(tmp_path / "task", names={"background": 0, "organ": 1}), tmp_path)
    with pytest.raises(ValueError, match=r"label 2 of imagesTr/case_00\.nii\.gz is none of the classes \(0, 1\)"):
        classes_of(manifest, labelled_rows(manifest))


def test_a_folder_prepared_before_values_were_noted_is_prepared_again(tmp_path):
    folder = decathlon(tmp_path / "task")
    new = ready(folder, tmp_path)
    old = pq.read_table(new.folder / NAME).drop_columns("label_values")
    pq.write_table(old, new.folder / NAME)
    assert PreparedVolumes(read_manifest(new.folder, FOR_RUNS))[0].shape == SHAPE
    with pytest.raises(ValueError, match="prepared before the values of labels were noted; run"):
        labelled_rows(read_manifest(new.folder, (*FOR_RUNS, *LABELS)))
    again = ready(folder, tmp_path)
    assert again.fingerprint(labels=True) == new.fingerprint(labels=True)
    assert len(labelled_rows(again)) == 3


@pytest.mark.parametrize("names", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_labels_lie_beside_their_images(tmp_path, names):
    for name in names:
        save_nifti(tmp_path / name / "a.nii.gz", blobs(0, (8, 8, 8)))
    save_nifti(tmp_path / names[0] / "b.nii.gz", blobs(0, (8, 8, 8)))
    labels = labels_beside(tmp_path)
    assert labels == tmp_path / names[1]
    listing = only_labelled(find_sources(tmp_path, labels=labels))
    assert [(one.path, one.label) for one in listing.sources] == [(f"{names[0]}/a.nii.gz", "a.nii.gz")]
    assert (f"{names[0]}/b.nii.gz", NO_LABEL) in listing.left_out
    assert labels_beside(labels) is None


def test_a_run_prepares_labels_with_its_volumes(tmp_path):
    folder, numbers = decathlon(tmp_path / "task", cases=1), load_data_section(ROOT / "recipes" / "demo.yaml", [])
    recipe = SimpleNamespace(data=numbers, views=SimpleNamespace(coarsest_last=False, crop_size=CROP))
    prepare = partial(prepare_data, folder, tmp_path / "ready", recipe, resumes=False, labels=labels_beside(folder))
    manifest = open_manifest(prepare(), (*FOR_RUNS, *LABELS))
    assert classes_of(manifest, labelled_rows(manifest)).names == ("background", "organ", "tumour")
    decathlon(folder, names={"whole": [1, 2]})
    with pytest.raises(ValueError, match="whole is a region of several labels"):
        prepare()


def test_larger_budgets_hold_the_subjects_of_smaller_ones():
    names = [f"s{number}" for number in range(30)]
    five, two = choose_subjects(names, 5, 1), choose_subjects(names[::-1], 2, 1)
    assert five[:2] == two
    assert len(set(five)) == 5
    assert choose_subjects(names, 5, 2) != five
    assert sorted(choose_subjects(names, 30, 3)) == sorted(names)
    for budget in (0, 31):
        with pytest.raises(ValueError, match=f"a budget of {budget} subjects: choose from 1 to the 30 that there are"):
            choose_subjects(names, budget, 1)
