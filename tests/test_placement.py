"""What is computed on a prepared volume comes back to the right voxels of its file."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from data.image_processing_volume import VolumeImageProcessor
from data.placement import to_source_grid

SHAPE = (21, 26, 17)


def image(axes="LPI", spacing=(1.5, 0.8, 2.0)):
    """Zeros but for a box of noise, the axes of the file as asked for."""
    rng, voxels = np.random.default_rng(0), np.zeros(SHAPE, np.float32)
    voxels[3:19, 4:22, 2:15] = rng.uniform(1, 2, (16, 18, 13))
    turn = nib.orientations.axcodes2ornt(axes)
    matrix = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(turn):
        matrix[int(world), axis] = sign * spacing[axis]
    matrix[:, 3] = 10, -20, 5, 1
    return nib.Nifti1Image(voxels, matrix)


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SRA", "PIL"])
@pytest.mark.parametrize("coarsest_last", [False, True])
@pytest.mark.parametrize("spacing", [[1.0, 1.0, 1.0], "native"])
def test_coordinates_in_mm_come_back(axes, coarsest_last, spacing):
    source = image(axes)
    placed = VolumeImageProcessor("RAS", spacing, (16, 16, 16), coarsest_last=coarsest_last).place(source)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in placed.voxels.shape[1:]), indexing="ij"))
    to_mm = source.affine[:3, :3] @ placed.to_source[:, :3]
    mm = np.einsum("ij,jxyz->ixyz", to_mm, grid) + (source.affine @ [*placed.to_source[:, 3], 1])[:3, None, None, None]
    found = to_source_grid(torch.from_numpy(mm), placed).numpy()
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    true = np.einsum("ij,jxyz->ixyz", source.affine[:3, :3], voxels) + source.affine[:3, 3, None, None, None]
    inner = np.s_[:, 5:17, 6:20, 4:13]  # away from the border, where the last voxel is repeated
    np.testing.assert_allclose(found[inner], true[inner], atol=1e-9)
    assert found.shape[1:] == SHAPE == placed.shape
    assert (found[1:, :2] == 0).all()
    assert (found[0, :2] == 1).all(), "outside is class 0"


def test_it_is_linear_interpolation():
    placed = VolumeImageProcessor("RAS", (1.0, 1.0, 1.0), (16, 16, 16)).place(image("LPI"))
    scores = torch.rand(2, *placed.voxels.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inverse = np.linalg.inv(placed.to_source[:, :3])
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij")).reshape(3, -1)
    places = inverse @ (voxels - placed.to_source[:, 3:])
    expected = map_coordinates(scores[1].numpy(), places, order=1, mode="nearest").reshape(SHAPE)
    inside = ((places > -0.5) & (places <= np.array(scores.shape[1:])[:, None] - 0.5)).all(axis=0).reshape(SHAPE)
    found = to_source_grid(scores, placed)
    np.testing.assert_allclose(found[1].numpy(), np.where(inside, expected, 0), atol=1e-9)


def test_a_whole_map_of_classes_comes_back_unchanged_where_nothing_is_resampled():
    source = image("PIL", (1.0, 1.0, 1.0))
    placed = VolumeImageProcessor("RAS", (1.0, 1.0, 1.0), (16, 16, 16)).place(source)
    classes = torch.nn.functional.one_hot(torch.from_numpy((placed.voxels[0] > 0.5).astype(int)), 2).movedim(-1, 0)
    found = to_source_grid(classes.float(), placed).argmax(dim=0).numpy()
    voxels = source.get_fdata()
    box = voxels[3:19, 4:22, 2:15]
    expected = np.zeros(SHAPE, int)
    expected[3:19, 4:22, 2:15] = (box - box.mean()) / box.std() > 0.5
    assert (found == expected).mean() == 1
