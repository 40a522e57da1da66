"""Voxel sizes as a mode - fixed, the data set's median, each volume's own - and crops as thin as slices are thick."""

import numpy as np
import pytest
import torch
from conftest import blobs, prepared, save_nifti
from test_prepare import rows
from test_stream import TURN, make_stream
from test_views import MIRROR

from data.image_processing_volume import VolumeImageProcessor
from data.manifest import MEDIAN
from data.stored_volume import HeldVolume
from data.stream import render, stack_views
from data.volume import NATIVE, axis_order

THICK = (0.9, 5.0, 1.0)  # mm, of coronal slices


@pytest.fixture
def scans(tmp_path):
    """Three volumes of other voxel sizes, with slices in other planes."""
    for number, spacing in enumerate([(1.0, 1.0, 1.0), THICK, (1.2, 0.8, 5.0)]):
        save_nifti(tmp_path / "data" / f"{number}.nii.gz", blobs(number, (30, 32, 28)), spacing)
    return tmp_path / "data"


def test_native_volumes_keep_their_voxels_and_sizes(scans, tmp_path):
    ready = prepared(scans, tmp_path / "ready", spacing=NATIVE)
    assert ready.spacing == NATIVE
    for number, row in enumerate(rows(tmp_path / "ready").values()):
        expected = blobs(number, (30, 32, 28)).astype(np.float64)
        expected = (expected - expected.mean()) / expected.std()
        np.testing.assert_allclose(ready[number][:, :, :], expected, atol=3e-3)
        assert np.allclose(ready[number].spacing, [(1.0, 1.0, 1.0), THICK, (1.2, 0.8, 5.0)][number])
        assert np.allclose(row["spacing"], ready[number].spacing)
        assert np.array_equal(np.reshape(row["prepared_to_source"], (3, 4)), np.eye(3, 4))


def test_the_median_is_of_each_axis_and_stays_when_files_are_added(scans, tmp_path):
    ready = prepared(scans, tmp_path / "ready", spacing=MEDIAN)
    assert ready.spacing == pytest.approx([1.0, 1.0, 1.0])
    for number in range(3, 9):
        save_nifti(scans / f"{number}.nii.gz", blobs(number), (2.0, 2.0, 2.0))
    more = prepared(scans, tmp_path / "ready", spacing=MEDIAN)
    assert len(more) == 9
    assert np.allclose(more.spacings, 1.0)
    anew = prepared(scans, tmp_path / "anew", spacing=MEDIAN)
    assert np.allclose(anew.spacings, [2.0, 2.0, 2.0])
    content = anew.path(4).read_bytes()
    anew.path(4).unlink()
    anew.read([4], lambda volumes: volumes[0][:, :, :])
    assert anew.path(4).read_bytes() == content


def test_the_median_is_along_the_axes_that_the_encoder_sees(tmp_path):
    save_nifti(tmp_path / "data" / "a.nii.gz", blobs(0), (1.0, 1.5, 2.0))
    assert prepared(tmp_path / "data", tmp_path / "ready", "SAR", MEDIAN).spacing == pytest.approx([2.0, 1.5, 1.0])


def test_slices_are_interpolated_not_repeated(tmp_path):
    save_nifti(tmp_path / "data" / "a.nii.gz", blobs(0, (30, 20, 28)), THICK)
    (volume,) = prepared(tmp_path / "data", tmp_path / "ready")
    voxels = volume[:, :, :].astype(np.float32)
    assert voxels.shape == (27, 100, 28)
    inner = voxels[:, 3:-3]
    assert (np.abs(np.diff(inner, axis=1)).max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize(
    ("spacing", "order"),
    [
        ((1.0, 1.0, 1.0), (0, 1, 2)),
        ((1.0, 1.0, 5.0), (0, 1, 2)),
        (THICK, (0, 2, 1)),
        ((4.0, 0.5, 0.5), (1, 2, 0)),
        ((1.0, 0.95, 0.95), (0, 1, 2)),  # as good as isotropic: nothing is turned
    ],
)
def test_the_coarsest_axis_comes_last_whichever_it_is(spacing, order):
    assert axis_order(spacing, True) == order
    assert axis_order(spacing, False) == (0, 1, 2)


@pytest.mark.parametrize("turn", [TURN, MIRROR])
@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("spacing", [(0.9, 1.0, 4.0), (0.9, 4.0, 1.0), (4.0, 0.9, 1.0)])
def test_thin_crops_read_what_their_affines_say(spacing, interpolation, turn):
    """By a volume whose values are its own coordinates in mm."""
    size, crop = [96, 96, 96], (24, 20, 8)
    thick = int(np.argmax(spacing))
    size[thick] = 24
    grid = np.stack(np.meshgrid(*[np.arange(n) * mm for n, mm in zip(size, spacing)], indexing="ij"))
    volume = HeldVolume((grid * [[[[1.0]]], [[[0.5]]], [[[0.25]]]]).sum(0).astype(np.float32), spacing=spacing)
    stream = make_stream(
        [volume],
        5,
        crop_size=crop,
        coarsest_last=True,
        interpolation=interpolation,
        intensity={},
        shared=turn,
        independent=turn,
        mask_block=4,
        feature_stride=(4, 4, 4),
        cells=(2, 2, 1),
    )
    voxel = np.stack(np.meshgrid(*map(np.arange, crop), indexing="ij"))
    for index in range(4):
        samples = stack_views([stream[index]])
        views = render(samples, torch.device("cpu"), crop, interpolation, "augmented")["views"]
        for view, affine, mm in zip(views[:, 0].numpy(), samples["crop_to_volume"].numpy(), samples["spacing"].numpy()):
            place = np.tensordot(affine[:, :3], voxel, 1) + affine[:, 3, None, None, None]
            inside = ((place >= 6) & (place <= np.array(size)[:, None, None, None] - 7)).all(0)
            expected = (place * np.array(spacing)[:, None, None, None] * [[[[1.0]]], [[[0.5]]], [[[0.25]]]]).sum(0)
            np.testing.assert_allclose(view[inside], expected[inside], atol=0.02)
            assert mm.argmax() == 2
            step = np.diag(spacing) @ affine[:, :3]
            np.testing.assert_allclose(mm, np.linalg.norm(step, axis=0), rtol=1e-6)
            if turn is MIRROR:
                assert np.flatnonzero(affine[:, 2]).tolist() == [thick]


@pytest.mark.parametrize("coarsest_last", [False, True])
def test_the_processor_gives_what_was_trained_on(scans, tmp_path, coarsest_last):
    ready = prepared(scans, tmp_path / "ready", spacing=NATIVE)
    processor = VolumeImageProcessor(spacing=NATIVE, crop_size=(24, 24, 8), coarsest_last=coarsest_last)
    processor.save_pretrained(tmp_path / "processor")
    processor = VolumeImageProcessor.from_pretrained(tmp_path / "processor")
    for number, order in enumerate([(0, 1, 2), (0, 2, 1), (0, 1, 2)]):
        found = processor.prepare(scans / f"{number}.nii.gz")
        trained_on = ready[number][:, :, :]
        assert np.array_equal(found.astype(np.float16), trained_on.transpose(order if coarsest_last else (0, 1, 2)))
        assert processor(scans / f"{number}.nii.gz")["pixel_values"].shape == (1, 1, 24, 24, 8)
