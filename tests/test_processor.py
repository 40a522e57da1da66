"""The processor gives exactly what the training data were."""

import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import blobs, prepared, save_nifti

from data.image_processing_volume import VolumeImageProcessor
from data.resampling import cut_views, read_block
from data.volume import BadVolume


def cut(volume, start, crop_size):
    """The crop from voxel `start` on, by the way that training takes."""
    affine = np.concatenate((np.eye(3), np.array(start, float)[:, None]), axis=1)
    block, crop_to_block = read_block(volume, affine, crop_size, "linear")
    return cut_views([block], crop_to_block[None], crop_size, "linear")[0, 0].numpy()


@pytest.fixture
def scan(tmp_path):
    """Anisotropic, oblique in its axes (LPS stored as ASL), with an empty border."""
    volume = np.zeros((36, 50, 30), np.int16)
    volume[3:-4, 5:-2, 2:-1] = blobs(5, (29, 43, 27))
    affine = np.array([[0, 0, -1.5, 40], [0.9, 0, 0, -20], [0, 1.1, 0, -30], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def volume_of_a_run(path, folder, orientation="RAS"):
    """In half precision."""
    (volume,) = prepared(path, folder / orientation, orientation)
    return volume[:, :, :]


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAR", "ILP"])
def test_a_path_and_an_image_give_the_bits_of_the_training_data(scan, tmp_path, orientation):
    processor = VolumeImageProcessor(orientation, crop_size=(16, 24, 8))
    trained_on = volume_of_a_run(scan, tmp_path / "prepared", orientation)
    for image in (scan, str(scan), nib.load(scan)):
        assert np.array_equal(processor.prepare(image).astype(np.float16), trained_on)
    crop = processor(scan)["pixel_values"]
    assert crop.shape == (1, 1, 16, 24, 8)
    start = (np.array(trained_on.shape) - (16, 24, 8)) // 2
    assert np.array_equal(crop[0, 0].half(), cut(trained_on, start, (16, 24, 8)))


def test_axes_go_where_the_orientation_says(scan, tmp_path):
    ras, sar = (volume_of_a_run(scan, tmp_path / "prepared", o) for o in ("RAS", "SAR"))
    np.testing.assert_allclose(sar, ras.transpose(2, 1, 0), atol=2e-3)


def test_an_array_with_its_spacing_gives_the_same(tmp_path):
    path = save_nifti(tmp_path / "a.nii", blobs(1), spacing=(1.3, 0.8, 2.0))
    processor = VolumeImageProcessor(crop_size=(16, 16, 16))
    volume = blobs(1)
    for array in (volume, volume.astype(np.float32), torch.from_numpy(volume)):
        assert np.array_equal(processor.prepare(array, spacing=(1.3, 0.8, 2.0)), processor.prepare(path))
    with pytest.raises(ValueError, match="needs its voxel size"):
        processor(volume)


def test_small_volumes_are_padded_as_in_training(tmp_path):
    path = save_nifti(tmp_path / "a.nii", blobs(1, (20, 33, 12)))
    size = (32, 32, 15)
    trained_on = volume_of_a_run(path, tmp_path / "prepared")
    start = [-((c - v) // 2) if v < c else (v - c) // 2 for v, c in zip(trained_on.shape, size)]
    crop = VolumeImageProcessor(crop_size=size)(path)["pixel_values"][0, 0]
    assert np.array_equal(crop.half(), cut(trained_on, start, size))


def test_lists_sizes_and_whole_volumes(tmp_path):
    paths = [save_nifti(tmp_path / f"{i}.nii", blobs(i)) for i in range(2)]
    processor = VolumeImageProcessor(crop_size=(16, 16, 16))
    both = processor(paths)["pixel_values"]
    assert both.shape == (2, 1, 16, 16, 16)
    assert torch.equal(both[1:], processor(paths[1])["pixel_values"])
    assert torch.equal(processor(tuple(paths))["pixel_values"], both)
    assert torch.equal(processor(paths, crop_size=np.array([16, 16, 16]))["pixel_values"], both)
    with pytest.raises(ValueError, match="must be three numbers"):
        processor(paths, crop_size=8)
    other = save_nifti(tmp_path / "other.nii", blobs(2, (20, 21, 22)))
    with pytest.raises(ValueError, match="one at a time"):
        processor([paths[0], other], crop_size="whole")
    assert processor(paths[0], crop_size=(8, 16, 24))["pixel_values"].shape == (1, 1, 8, 16, 24)
    assert np.array_equal(processor(paths[0], crop_size="whole")["pixel_values"][0, 0], processor.prepare(paths[0]))


def test_a_volume_that_cannot_be_used_says_why(tmp_path):
    processor = VolumeImageProcessor()
    with pytest.raises(BadVolume, match="all voxels are the same"):
        processor(np.zeros((8, 8, 8)), spacing=(1, 1, 1))
    with pytest.raises(BadVolume, match="not a readable NIfTI"):
        processor(tmp_path / "missing.nii")
    with pytest.raises(BadVolume, match="not a 3D volume"):
        processor(np.zeros((8, 8)), spacing=(1, 1))
    with pytest.raises(BadVolume, match="not a size in mm"):
        processor(blobs(0), spacing=(1, 1))


@pytest.mark.parametrize(
    "numbers",
    [
        {"crop_size": (10**6,) * 3},
        {"crop_size": (8, 8)},
        {"crop_size": (0, 8, 8)},
        {"spacing": (1e-9, 1, 1)},
        {"orientation": "XYZ"},
    ],
)
def test_absurd_numbers_are_refused(numbers):
    with pytest.raises(ValueError, match=r"must be three|must name each axis"):
        VolumeImageProcessor(**numbers)


def test_from_pretrained_in_a_clean_process_gives_the_same_bits(scan, tmp_path):
    VolumeImageProcessor.register_for_auto_class("AutoImageProcessor")
    processor = VolumeImageProcessor("LAS", (1.5, 1.0, 2.0), (16, 16, 16))
    processor.save_pretrained(tmp_path / "saved")
    code = (
        "import sys, numpy; from transformers import AutoImageProcessor\n"
        "processor = AutoImageProcessor.from_pretrained('saved', trust_remote_code=True)\n"
        "numpy.save('crop.npy', processor('scan.nii.gz')['pixel_values'].numpy())\n"
        "assert not {'models', 'training', 'data'} & set(sys.modules)"
    )
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, env=environment, check=True)
    assert np.array_equal(np.load(tmp_path / "crop.npy"), processor(scan)["pixel_values"])
