"""Geometry, by coordinate fields: volumes whose values are their own coordinates."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data.views import alignment_points, crop_to_volume, cut, sample_starts, shared_box, to_crop
from losses.consistency import sample_cells

SIZES = st.tuples(*[st.integers(8, 80)] * 3)


def draw(seed, volume_size, crop_size, overlap=(0.4, 0.8)):
    rng = np.random.default_rng(seed)
    starts = sample_starts(rng, volume_size, crop_size, overlap)
    mirror = rng.random(3) < 0.5
    affines = torch.from_numpy(np.stack([crop_to_volume(start, crop_size, mirror) for start in starts]))
    return starts, mirror, affines


def coordinate_field(affine, crop_size):
    """Channels are the volume coordinates of each crop voxel: `[3, X, Y, Z]`."""
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in crop_size], indexing="ij"))
    return torch.einsum("ij,jxyz->ixyz", affine[:, :3], index) + affine[:, 3, None, None, None]


@given(st.integers(0, 10**6), SIZES, SIZES)
@settings(deadline=None, max_examples=200)
def test_crops_stay_inside_and_share_what_they_must(seed, volume_size, crop_size):
    starts, _, _ = draw(seed, volume_size, crop_size)
    for v, p, a, b in zip(volume_size, crop_size, *starts):
        if v <= p:
            assert a == b == -((p - v) // 2)
        else:
            assert min(a, b) >= 0
            assert max(a, b) + p <= v
            assert p - abs(a - b) >= 0.4 * p


def test_either_view_may_be_the_lower_one_on_each_axis():
    shifts = np.array([np.subtract(*draw(seed, (64, 64, 64), (32, 32, 32))[0]) for seed in range(200)])
    assert ((shifts > 0).mean(0) > 0.3).all()
    assert ((shifts < 0).mean(0) > 0.3).all()


def test_overlap_has_the_asked_volume():
    shared = []
    for seed in range(400):
        starts, _, _ = draw(seed, (300, 300, 300), (100, 100, 100))
        shared.append(np.prod(1 - np.abs(starts[0] - starts[1]) / 100))
    assert min(shared) > 0.4 - 0.05
    assert max(shared) < 0.8 + 0.05
    assert np.mean(shared) == pytest.approx(0.6, abs=0.02)


@given(st.integers(0, 10**6), SIZES, SIZES)
@settings(deadline=None, max_examples=100)
def test_a_crop_holds_the_voxels_its_affine_names(seed, volume_size, crop_size):
    starts, mirror, affines = draw(seed, volume_size, crop_size)
    code = np.arange(1, np.prod(volume_size) + 1, dtype=np.float32).reshape(volume_size)
    for start, affine in zip(starts, affines):
        crop = cut(code, start, crop_size, mirror)
        x, y, z = coordinate_field(affine, crop_size).round().long().numpy()
        inside = np.logical_and.reduce([(c >= 0) & (c < n) for c, n in zip((x, y, z), volume_size)])
        expected = np.zeros(crop_size, np.float32)
        expected[inside] = code[x[inside], y[inside], z[inside]]
        np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(
    ("crop_size", "volume_size"),
    [
        ((160, 160, 160), (257, 257, 257)),
        ((64, 64, 64), (65, 66, 67)),
        ((64, 64, 64), (64, 64, 64)),
        ((64, 64, 64), (50, 90, 64)),
        ((96, 64, 80), (120, 130, 100)),
        ((128, 128, 32), (180, 170, 40)),
    ],
)
def test_paired_cells_are_the_same_place(crop_size, volume_size, stride):
    for seed in range(6):
        _, _, affines = draw(seed, volume_size, crop_size)
        dense = torch.stack([F.avg_pool3d(coordinate_field(a, crop_size)[None], stride)[0] for a in affines])
        points = alignment_points(affines, crop_size, (7, 5, 3), 2, (stride,) * 3)
        cells = sample_cells(dense, points, crop_size, 2)
        assert cells.shape == (2, 3, 7, 5, 3)
        difference = (cells[0] - cells[1]).abs()
        assert difference.max() < 1e-3  # voxels
        # and they are the places that they claim to be, spread over the shared region
        low, high = shared_box(affines, crop_size, (stride / 2,) * 3)
        for axis, count in enumerate((7, 5, 3)):
            centres = low[0, axis] + (high - low)[0, axis] * (torch.arange(count) + 0.5) / count
            found = cells[0, axis].movedim(axis, 0).flatten(1)
            torch.testing.assert_close(found, centres[:, None].expand_as(found), atol=1e-3, rtol=0)


def test_swapped_axes_would_be_noticed():
    _, _, affines = draw(3, (257, 257, 257), (96, 64, 80))
    dense = torch.stack([F.avg_pool3d(coordinate_field(a, (96, 64, 80))[None], 8)[0] for a in affines])
    points = alignment_points(affines, (96, 64, 80), (7, 7, 7), 2, (8, 8, 8))
    cells = sample_cells(dense, points.flip(-1), (96, 64, 80), 2)
    assert (cells[0] - cells[1]).abs().mean() > 0.5


def test_to_crop_inverts_the_affine():
    _, _, affines = draw(1, (60, 70, 80), (32, 48, 40))
    index = torch.rand(2, 50, 3) * 30
    places = torch.einsum("nij,npj->npi", affines[:, :, :3], index) + affines[:, None, :, 3]
    torch.testing.assert_close(to_crop(affines, places), index, atol=1e-4, rtol=0)
