"""Crops scattered over a volume, and the places of crops in mm."""

import numpy as np
import pytest

from data.views import draw_turn, freedom, place_in_volume, scatter_views, voxel_spacing

ROTATION, ZOOM = {"degrees": (30.0, 30.0, 90.0)}, {"range": (0.7, 1.4)}
MIRRORED, TURNED = (
    {"mirror": 0.5, "rotation": ROTATION | {"probability": chance}, "zoom": ZOOM | {"probability": chance}}
    for chance in (0.0, 1.0)
)


@pytest.mark.parametrize("turn", [MIRRORED, TURNED], ids=["mirrored", "turned"])
def test_the_gap_between_two_crops_is_the_difference_of_their_places(turn):
    """Volumes whose voxels are their own coordinate in mm: what a crop shows at its centre is where it lies."""
    size, crop, spacing = (40, 36, 20), (12, 10, 4), np.array([1.0, 1.0, 3.0])
    rng = np.random.default_rng(3)
    middle = (np.array(size) - 1) / 2 * spacing
    for _ in range(200):
        shared = draw_turn(rng, turn, spacing)
        affines = scatter_views(rng, size, crop, 0.0, shared, [np.eye(3)] * 3)
        voxels = np.stack(np.meshgrid(*map(np.arange, crop), indexing="ij")).reshape(3, -1)
        shown = (affines[:, :, :3] @ voxels + affines[:, :, 3:]) * spacing[:, None]  # [V, 3, voxels] in mm
        steps = [voxel_spacing(affine, spacing) for affine in affines]
        places = np.stack([place_in_volume(a, size, crop, step) for a, step in zip(affines, steps)])
        turned_back = np.linalg.inv(np.diag(spacing) @ shared / steps[0])
        np.testing.assert_allclose(places, (shown.mean(-1) - middle) @ turned_back.T, atol=1e-9)
        gap = turned_back @ (shown[1].mean(-1) - shown[0].mean(-1))
        np.testing.assert_allclose(places[1] - places[0], gap, atol=1e-9)
        offset = rng.uniform(-4, 4, 3)
        there = (affines[2, :, :3] @ ((np.array(crop) - 1) / 2 + offset) + affines[2, :, 3]) * spacing
        np.testing.assert_allclose(places[2] + offset * steps[2], turned_back @ (there - middle), atol=1e-9)


def test_scattered_crops_lie_anywhere_inside_and_reach_beyond_as_far_as_they_may():
    size, crop = (40, 36, 10), (12, 10, 16)
    rng = np.random.default_rng(0)
    for overhang in (0.0, 0.25):
        beyond = np.floor(overhang * np.array(crop))
        lows = []
        for _ in range(300):
            affines = scatter_views(rng, size, crop, overhang, np.eye(3), [np.eye(3)] * 3)
            assert np.array_equal(affines[:, :, :3], np.broadcast_to(np.eye(3), (3, 3, 3)))
            lows.append(affines[:, :, 3])
        lows = np.concatenate(lows)
        free = np.array(size) + 2 * beyond - crop
        assert np.array_equal(lows, np.round(lows))
        for axis in range(3):
            if free[axis] >= 0:
                assert set(lows[:, axis]) == set(np.arange(-beyond[axis], free[axis] - beyond[axis] + 1))
            else:
                assert set(lows[:, axis]) == {-3.0}  # 16 voxels around 10
        assert np.array_equal(freedom(size, crop, overhang), np.maximum(free, 0))


def test_scattered_crops_of_a_turned_volume_lie_inside_it():
    size, crop, rng = np.array((60, 50, 40)), np.array((12, 10, 8)), np.random.default_rng(1)
    corners = np.stack(np.meshgrid(*zip([-0.5] * 3, crop - 0.5), indexing="ij")).reshape(3, -1)
    for _ in range(100):
        affines = scatter_views(rng, size, crop, 0.0, draw_turn(rng, TURNED), [np.eye(3)] * 2)
        ends = affines[:, :, :3] @ corners + affines[:, :, 3:]
        assert (ends >= -0.501).all()
        assert (ends <= size[:, None] - 0.499).all()
