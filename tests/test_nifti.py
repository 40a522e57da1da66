"""Reading NIfTI, and what is done to a volume."""

import gzip
import warnings

import nibabel as nib
import numpy as np
import pytest
from conftest import blobs, save_nifti
from scipy.ndimage import zoom

from data.demo import demo_volume
from data.nifti import read_volume
from data.volume import BadVolume, prepare


def read(path):
    return read_volume(path, "RAS", (1.0, 1.0, 1.0))


def bad_files(folder):
    """One of each, with a word of the reason that a person should be given."""
    good = blobs(3)
    nan = good.astype(np.float32)
    nan[3, 4, 5], nan[6, 7, 8] = np.nan, np.inf
    whole = save_nifti(
        folder / "whole.nii.gz", np.random.default_rng(0).integers(0, 999, (40, 40, 40)).astype(np.int16)
    )
    packed = whole.read_bytes()
    (folder / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "text.nii").write_text("no image at all")
    (folder / "empty.nii.gz").write_bytes(b"")
    whole.unlink()
    (folder / "corrupt.nii.gz").write_bytes(packed[:12] + bytes(200) + packed[212:])
    nib.save(nib.Nifti1Image(good, np.diag([49.0, 49.0, 49.0, 1.0])), folder / "huge.nii.gz")
    colours = np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    header = nib.Nifti1Image(good, np.diag([1e3, 1e3, 1e3, 1.0]))
    nib.save(header, folder / "micrometres.nii.gz")
    return {
        folder / "huge.nii.gz": r"1960 x 2156 x 1764 voxels of 1 x 1 x 1 mm: are its 49 x 49 x 49 mm right",
        save_nifti(folder / "complex.nii.gz", good.astype(np.complex64)): "complex numbers; save their magnitude",
        save_nifti(folder / "colours.nii.gz", colours): "colours",
        folder / "corrupt.nii.gz": "not a readable NIfTI",
        folder / "micrometres.nii.gz": "not a size in mm",
        folder / "truncated.nii.gz": "truncated",
        folder / "text.nii": "not a readable NIfTI",
        folder / "empty.nii.gz": "not a readable NIfTI",
        save_nifti(folder / "flat.nii.gz", good[:, :, :1]): "2D",
        save_nifti(folder / "flat2.nii.gz", good[:, :, 0]): "2D",
        save_nifti(folder / "series.nii.gz", np.stack([good] * 3, axis=-1)): "4D",
        save_nifti(folder / "nan.nii.gz", nan): "2 voxels are NaN or infinite",
        save_nifti(folder / "constant.nii.gz", np.full((30, 30, 30), 7, np.int16)): "same",
        save_nifti(folder / "zero.nii.gz", np.zeros((30, 30, 30), np.int16)): "same",
    }


def test_each_bad_file_gets_its_reason(tmp_path):
    for path, word in bad_files(tmp_path).items():
        with pytest.raises(BadVolume, match=word) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_slope_that_makes_infinite_voxels_is_named_without_a_warning(tmp_path):
    image = nib.Nifti1Image(blobs(3), np.eye(4))
    image.header.set_slope_inter(1e38, 0)
    (tmp_path / "steep.nii").write_bytes(image.to_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadVolume, match="voxels are NaN or infinite"):
            read(tmp_path / "steep.nii")


def test_orientation_does_not_depend_on_how_a_file_is_stored(tmp_path):
    volume = blobs(5, (20, 24, 28))
    image = nib.Nifti1Image(volume, np.eye(4))
    nib.save(image, tmp_path / "ras.nii")
    stored = image.as_reoriented(nib.orientations.axcodes2ornt("ASL"))  # some permutation with flips
    assert stored.shape != image.shape
    nib.save(stored, tmp_path / "other.nii")
    np.testing.assert_array_equal(read(tmp_path / "ras.nii"), read(tmp_path / "other.nii"))
    left = read_volume(tmp_path / "ras.nii", "LAS", (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(left, read(tmp_path / "ras.nii")[::-1])


def test_the_voxel_size_is_the_affines(tmp_path):
    """Header zooms and affine can disagree; how a file is stored must not decide which one counts."""
    image = nib.Nifti1Image(blobs(5, (20, 24, 28)), np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header["pixdim"][1:4] = 1.0
    nib.save(image, tmp_path / "v.nii")
    assert read(tmp_path / "v.nii").shape == (40, 48, 56)


def test_normalised_over_the_nonzero_box(tmp_path):
    volume = np.zeros((30, 30, 30), np.int16)
    volume[5:25, 6:20, 7:28] = blobs(1, (20, 14, 21))
    out = read(save_nifti(tmp_path / "v.nii.gz", volume))
    assert out.shape == (20, 14, 21)
    assert out.mean() == pytest.approx(0, abs=1e-5)
    assert out.std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 37, 30), (2, 7, 33), (300, 5, 4)])
@pytest.mark.parametrize("factors", [(1.3, 0.7, 1.0), (0.5, 2.9, 1.6), (1.0, 1.0, 1.0)])
def test_resampling_is_that_of_scipy(shape, factors):
    volume, old = np.random.default_rng(0).normal(size=shape).astype(np.float32), np.array(factors)
    found = prepare(volume, old, (1.0, 1.0, 1.0)).voxels
    exact = np.maximum(np.round(np.array(shape) * old), 1) / shape
    coarse = old / old.min() > 3
    expected = (volume - volume.mean()) / volume.std()
    expected = zoom(expected, np.where(coarse, 1, exact), order=3, mode="nearest", grid_mode=True)
    expected = zoom(expected, np.where(coarse, exact, 1), order=1, mode="nearest", grid_mode=True)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (0.5, 0.8, 1.0), (1.0, 1.0, 5.0)])
def test_resampling_keeps_places(tmp_path, spacing):
    """A ramp along each axis stays the same ramp in mm."""
    for axis in range(3):
        n = np.array([24, 30, 20])
        ramp = np.arange(n[axis]) * spacing[axis] + 1
        volume = np.broadcast_to(ramp.reshape([-1 if a == axis else 1 for a in range(3)]), n).astype(np.float32)
        out = read(save_nifti(tmp_path / f"{axis}.nii", volume, spacing))
        assert out.shape == tuple(np.round(n * spacing).astype(int))
        profile = out.mean(axis=tuple(a for a in range(3) if a != axis)) * ramp.std() + ramp.mean()
        at = (np.arange(len(profile)) + 0.5) * n[axis] / len(profile) - 0.5  # source voxel of each result
        expected = at * spacing[axis] + 1
        inner = slice(len(profile) // 5, -len(profile) // 5)
        np.testing.assert_allclose(profile[inner], expected[inner], atol=0.02)
        assert np.unique(np.round(profile[inner], 3)).size == profile[inner].size  # no slice is there twice


def test_demo_volume_is_the_mni_template():
    image = nib.load(demo_volume())
    assert image.shape == (197, 233, 189)
    assert read(demo_volume()).shape == (145, 181, 155)


def test_gzip_and_plain_give_the_same_volume(tmp_path):
    path = save_nifti(tmp_path / "v.nii", blobs(4))
    with gzip.open(tmp_path / "w.nii.gz", "wb") as packed:
        packed.write(path.read_bytes())
    np.testing.assert_array_equal(read(path), read(tmp_path / "w.nii.gz"))
