"""Geometry, by coordinate fields: volumes whose values are their own coordinates."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from data.resampling import cut_views, is_a_copy, read_block
from data.views import alignment_points, draw_turn, sample_views, shared_box, to_crop, to_volume
from losses.cells import sample_cells

SIZES = st.tuples(*[st.integers(8, 80)] * 3)
SEEDS = st.integers(0, 10**6)
NEVER = {
    "mirror": 0.0,
    "rotation": {"probability": 0.0, "degrees": (30.0, 30.0, 30.0)},
    "zoom": {"probability": 0.0, "range": (0.7, 1.4)},
}
MIRROR = NEVER | {"mirror": 0.5}
ALWAYS = {
    "mirror": 0.5,
    "rotation": {"probability": 1.0, "degrees": (30.0, 30.0, 30.0)},
    "zoom": {"probability": 1.0, "range": (0.7, 1.4)},
}


def draw(seed, volume_size, crop_size, shared=MIRROR, independent=NEVER, overlap=(0.4, 0.8), overhang=0.0):
    """`crop_to_volume` of two views."""
    rng = np.random.default_rng(seed)
    turns = [draw_turn(rng, chances) for chances in (shared, independent, independent)]
    return torch.from_numpy(sample_views(rng, volume_size, crop_size, overlap, overhang, turns[0], turns[1:]))


def lower_corners(affines, crop_size):
    """First voxels of two upright or mirrored crops."""
    ends = [to_volume(a, torch.tensor([[0.0] * 3, [n - 1.0 for n in crop_size]]).double()).amin(0) for a in affines]
    return torch.stack(ends).numpy()


def voxels(size):
    return torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.double) for n in size], indexing="ij"), dim=-1)


def cut(volume, affines, crop_size, interpolation="linear"):
    """Views `[N, X, Y, Z]` by the way that training takes."""
    blocks, moved = zip(*(read_block(volume, a.numpy(), crop_size, interpolation) for a in affines))
    return cut_views(list(blocks), torch.stack(moved), crop_size, interpolation)[:, 0]


def cells_of_field(affines, crop_size, stride, points):
    """What the alignment reads where the features of a cell are the mean volume coordinates of its voxels."""
    fields = torch.stack([to_volume(a, voxels(crop_size)).movedim(-1, 0) for a in affines])
    return sample_cells(F.avg_pool3d(fields, stride), points, crop_size)


# --------------------------------------------------------------------------- where views lie


@given(SEEDS, SIZES, SIZES)
@settings(deadline=None, max_examples=200)
def test_crops_stay_inside_and_share_what_they_must(seed, volume_size, crop_size):
    corners = lower_corners(draw(seed, volume_size, crop_size), crop_size)
    assert (corners == corners.round()).all()
    for v, p, a, b in zip(volume_size, crop_size, *corners):
        if v <= p:
            assert a == b == -((p - v) // 2)
        else:
            assert min(a, b) >= 0
            assert max(a, b) + p <= v
            assert p - abs(a - b) >= 0.4 * p


def test_either_view_may_be_the_lower_one_on_each_axis():
    size = (32, 32, 32)
    shifts = np.array([np.subtract(*lower_corners(draw(seed, (64, 64, 64), size), size)) for seed in range(200)])
    assert ((shifts > 0).mean(0) > 0.3).all()
    assert ((shifts < 0).mean(0) > 0.3).all()


@pytest.mark.parametrize("shared", [MIRROR, ALWAYS])
def test_overlap_has_the_asked_volume(shared):
    fractions, axes = [], []
    for seed in range(400):
        affines = draw(seed, (500, 500, 500), (100, 100, 100), shared)
        shift = to_crop(affines[0], affines[1][:, 3]) - to_crop(affines[0], affines[0][:, 3])
        fractions.append(float((1 - shift.abs() / 100).prod()))
        axes += (1 - shift.abs() / 100).tolist()
    assert min(fractions) > 0.4 - 0.05
    assert max(fractions) < 0.8 + 0.05
    assert np.mean(fractions) == pytest.approx(0.6, abs=0.02)
    assert np.mean(axes) == pytest.approx(0.847, abs=0.01)  # of the published sampler, over the Dirichlet split
    assert np.median(axes) == pytest.approx(0.871, abs=0.02)  # in steps of 0.02


@given(SEEDS, st.tuples(*[st.integers(40, 120)] * 3), st.tuples(*[st.integers(16, 48)] * 3))
@settings(deadline=None, max_examples=100)
def test_a_turned_pair_stays_inside_where_it_fits_and_else_in_the_middle(seed, volume_size, crop_size):
    affines = draw(seed, volume_size, crop_size, ALWAYS)
    # the pair is a box in the frame of view 1: its corners, in the volume
    low, high = torch.zeros(3).double() - 0.5, torch.tensor(crop_size).double() - 0.5
    shift = to_crop(affines[0], affines[1][:, 3])
    box = torch.stack((torch.minimum(low, low + shift), torch.maximum(high, high + shift)))
    corners = to_volume(affines[0], torch.cartesian_prod(*box.T))
    for axis, size in enumerate(volume_size):
        first, last = float(corners[:, axis].min()), float(corners[:, axis].max())
        if last - first <= size:
            assert first >= -0.5 - 1e-3
            assert last <= size - 0.5 + 1e-3
        else:
            assert (first + last) / 2 == pytest.approx((size - 1) / 2, abs=1)


def test_overhang_lets_small_volumes_overlap_as_asked():
    """As the published loader pads: crops of 160^3 of a brain of 145 x 181 x 155."""
    volume_size, crop_size = (145, 181, 155), (160, 160, 160)
    shared = {overhang: [] for overhang in (0.0, 0.3)}
    for overhang, fractions in shared.items():
        for seed in range(200):
            corners = lower_corners(draw(seed, volume_size, crop_size, overhang=overhang), crop_size)
            fractions.append(np.prod(1 - np.abs(corners[0] - corners[1]) / 160))
            ends = corners.max(0) + 160
            reach = overhang * 160 + 1
            assert (corners >= np.minimum(-reach, (np.array(volume_size) - 160) // 2 - 1)).all()
            assert (ends <= np.maximum(volume_size + np.array(reach), 161)).all()
    assert np.mean(shared[0.0]) > 0.85
    assert np.mean(shared[0.3]) == pytest.approx(0.6, abs=0.03)
    assert max(shared[0.3]) < 0.85


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 1.0, 3.0)])
def test_turns_are_rigid_in_mm_but_for_the_zoom(spacing):
    for seed in range(20):
        matrix = (
            np.diag(spacing) @ draw_turn(np.random.default_rng(seed), ALWAYS, spacing) @ np.diag(1 / np.array(spacing))
        )
        gram = matrix.T @ matrix
        factor = np.cbrt(abs(np.linalg.det(matrix)))
        np.testing.assert_allclose(gram, factor**2 * np.eye(3), atol=1e-9)
        assert 0.7 <= factor <= 1.4


def test_chances_of_a_turn_and_what_they_leave_alone():
    chances = {
        "mirror": 0.3,
        "rotation": {"probability": 0.4, "degrees": (0, 0, 20)},
        "zoom": {"probability": 0.5, "range": (0.5, 2)},
    }
    drawn = [draw_turn(np.random.default_rng(seed), chances) for seed in range(2000)]
    turned = [abs(m[0, 1]) > 1e-12 for m in drawn]
    factors = [np.cbrt(abs(np.linalg.det(m))) for m in drawn]
    assert np.mean(turned) == pytest.approx(0.4, abs=0.03)
    assert np.mean([abs(f - 1) > 1e-9 for f in factors]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([f < 1 for f in factors if abs(f - 1) > 1e-9]) == pytest.approx(0.5, abs=0.05)
    assert all((abs(m[2, :2]) < 1e-12).all() for m in drawn)  # about Z alone
    assert max(np.degrees(np.arctan(abs(m[0, 1] / m[0, 0]))) for m in drawn) < 20 + 1e-6
    generators = [np.random.default_rng(0) for _ in range(2)]
    draw_turn(generators[0], NEVER), draw_turn(generators[1], ALWAYS)
    assert generators[0].random() == generators[1].random()  # as many numbers are drawn


# --------------------------------------------------------------------------- what is in them


@given(SEEDS, SIZES, SIZES, st.sampled_from(["linear", "cubic"]))
@settings(deadline=None, max_examples=100)
def test_an_unturned_crop_is_a_copy_of_the_voxels_its_affine_names(seed, volume_size, crop_size, interpolation):
    affines = draw(seed, volume_size, crop_size)
    code = np.arange(1, np.prod(volume_size) + 1, dtype=np.float32).reshape(volume_size)
    for crop, affine in zip(cut(code, affines, crop_size, interpolation), affines):
        assert is_a_copy(affine.numpy())
        x, y, z = to_volume(affine, voxels(crop_size)).movedim(-1, 0).long().numpy()
        inside = np.logical_and.reduce([(c >= 0) & (c < n) for c, n in zip((x, y, z), volume_size)])
        expected = np.zeros(crop_size, np.float32)
        expected[inside] = code[x[inside], y[inside], z[inside]]
        np.testing.assert_array_equal(crop, expected)


@given(SEEDS, st.tuples(*[st.integers(30, 50)] * 3), st.tuples(*[st.integers(8, 40)] * 3))
@settings(deadline=None, max_examples=30)
def test_a_turned_crop_equals_scipy(seed, volume_size, crop_size):
    volume = np.random.default_rng(seed).normal(size=volume_size).astype(np.float32)
    affines = draw(seed, volume_size, crop_size, ALWAYS, ALWAYS)
    for interpolation, order, border in (("linear", 1, "grid-constant"), ("cubic", 3, "reflect")):
        for crop, affine in zip(cut(volume, affines, crop_size, interpolation), affines):
            places = to_volume(affine, voxels(crop_size)).movedim(-1, 0).numpy()
            expected = map_coordinates(volume, places, order=order, mode=border)
            if order == 3:  # beyond the volume's border there is nothing
                beyond = [(p < -0.5) | (p > n - 0.5) for p, n in zip(places, volume_size)]
                expected[np.logical_or.reduce(beyond)] = 0
                on_border = [np.minimum(abs(p + 0.5), abs(p - n + 0.5)) < 1e-4 for p, n in zip(places, volume_size)]
                expected = np.where(np.logical_or.reduce(on_border), crop.numpy(), expected)
            np.testing.assert_allclose(crop, expected, atol=2e-3)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
def test_the_voxels_of_a_turned_crop_are_where_its_affine_says(interpolation):
    """A volume that holds its own X, Y or Z coordinate, cut with independent rotation, zoom and mirror."""
    size, crop_size = (90, 80, 100), (32, 40, 24)
    for seed in range(5):
        affines = draw(seed, size, crop_size, ALWAYS, ALWAYS)
        for axis in range(3):
            volume = voxels(size)[..., axis].float().numpy()
            for crop, affine in zip(cut(volume, affines, crop_size, interpolation), affines):
                places = to_volume(affine, voxels(crop_size))
                border = 12 if interpolation == "cubic" else 1  # a spline bends where the ramp ends
                inner = ((places >= border) & (places <= torch.tensor(size) - 1 - border)).all(-1)
                assert inner.float().mean() > 0.2
                assert (crop - places[..., axis])[inner].abs().max() < 1e-3  # voxels


def test_no_more_is_read_than_a_view_needs():
    affines = draw(0, (300, 300, 300), (64, 64, 64), NEVER)
    volume = np.zeros((300, 300, 300), np.float32)
    assert [tuple(read_block(volume, a.numpy(), (64, 64, 64), "cubic")[0].shape) for a in affines] == [
        (1, 64, 64, 64)
    ] * 2
    turned = draw(0, (300, 300, 300), (64, 64, 64), ALWAYS)
    for affine in turned:
        reach = np.abs(affine[:, :3].numpy()).sum(1) * 63
        block, _ = read_block(volume, affine.numpy(), (64, 64, 64), "linear")
        assert (np.array(block.shape[1:]) <= reach + 3).all()


# --------------------------------------------------------------------------- what is compared

CASES = [  # crop, volume: cubic and not, anisotropic; larger than, just larger than, equal to, smaller than the crop
    ((160, 160, 160), (257, 257, 257)),
    ((64, 64, 64), (65, 66, 67)),
    ((64, 64, 64), (64, 64, 64)),
    ((64, 64, 64), (50, 90, 64)),
    ((96, 64, 80), (120, 130, 100)),
    ((128, 128, 32), (180, 170, 40)),
    ((256, 256, 32), (200, 240, 60)),
]


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(("crop_size", "volume_size"), CASES)
@pytest.mark.parametrize(("shared", "independent"), [(MIRROR, NEVER), (ALWAYS, NEVER), (ALWAYS, ALWAYS)])
def test_paired_cells_are_the_same_place(crop_size, volume_size, stride, shared, independent):
    errors, reached = [], []
    if max(crop_size) > 3 * min(crop_size):  # a thin slab turned out of its plane shares next to nothing
        shared, independent = (
            turn | {"rotation": {"probability": turn["rotation"]["probability"], "degrees": (0, 0, 30)}}
            for turn in (shared, independent)
        )
    for seed in range(4):
        affines = draw(seed, volume_size, crop_size, shared, independent)
        points, inside = alignment_points(affines, crop_size, (7, 5, 3), (2, 2, 2), (stride,) * 3)
        assert points.shape == (2, 105, 8, 3)
        cells = cells_of_field(affines, crop_size, stride, points)
        errors.append((cells[0] - cells[1]).abs()[inside])
        reached.append(inside.float().mean())
        # and they are the places that they claim to be
        claimed = to_volume(affines[0], points[0]).mean(1)
        torch.testing.assert_close(cells[0, inside].double(), claimed[inside], atol=1e-3, rtol=0)
    errors = torch.cat(errors)
    assert errors.mean(0).max() < 1e-3  # voxels; 0.05 are asked for
    assert errors.max() < 1e-2
    if independent["mirror"] == 0:
        assert min(reached) == 1
    else:
        assert np.mean(reached) > 0.25


@given(SEEDS, st.tuples(*[st.integers(3, 8)] * 3), st.tuples(*[st.integers(20, 90)] * 3), st.booleans())
@settings(deadline=None, max_examples=60)
def test_paired_cells_are_the_same_place_whatever_the_sizes(seed, grid, volume_size, apart):
    crop_size = tuple(8 * n for n in grid)
    affines = draw(seed, volume_size, crop_size, ALWAYS, ALWAYS if apart else NEVER)
    points, inside = alignment_points(affines, crop_size, (4, 3, 2), (1, 2, 3), (8, 8, 8))
    cells = cells_of_field(affines, crop_size, 8, points)
    difference = (cells[0] - cells[1]).abs()[inside]
    assert difference.numel() == 0 or difference.max() < 1e-2
    if not apart:
        assert inside.all()


def test_voxels_too_agree_after_independent_turns():
    """The whole way, resampling included: features are means of the voxels of a smooth volume."""
    size, crop_size = (200, 210, 190), (64, 64, 64)
    grid = voxels(size)
    for seed in range(4):
        affines = draw(seed, size, crop_size, ALWAYS, ALWAYS)
        points, inside = alignment_points(affines, crop_size, (5, 5, 5), (2, 2, 2), (8, 8, 8))
        centre = points.mean(2)
        place = to_volume(affines[0], centre[0])
        away = ((place > 40) & (place < torch.tensor(size) - 40)).all(-1)  # from the border, where voxels become 0
        for axis in range(3):
            crops = cut(grid[..., axis].float().numpy(), affines, crop_size)
            cells = sample_cells(F.avg_pool3d(crops[:, None], 8), points, crop_size)[..., 0]
            difference = (cells[0] - cells[1]).abs()[inside & away]
            assert difference.numel() > 5
            assert difference.max() < 1e-3


def test_cells_fill_the_box_evenly_and_stay_within_reach_of_the_features():
    crop_size, margin = (96, 64, 80), (4.0, 4.0, 4.0)
    affines = draw(3, (130, 120, 110), crop_size)
    low, high = shared_box(affines, crop_size, margin)
    points, _ = alignment_points(affines, crop_size, (7, 5, 3), (2, 3, 1), (8, 8, 8))
    by_axis = points[0].view(7, 5, 3, 2, 3, 1, 3)
    for axis, (cells, samples) in enumerate(((7, 2), (5, 3), (3, 1))):
        found = by_axis[..., axis].movedim((axis, axis + 3), (0, 1)).flatten(2)[..., 0].flatten()
        expected = low[axis] + (high - low)[axis] * (torch.arange(cells * samples) + 0.5) / (cells * samples)
        torch.testing.assert_close(found, expected.double())
    for view in points:
        assert (view >= torch.tensor(margin) - 0.5 - 1e-6).all()
        assert (view <= torch.tensor(crop_size) - 0.5 - torch.tensor(margin) + 1e-6).all()


def test_cells_that_one_view_does_not_reach_are_marked():
    crop_size = (64, 64, 64)
    for seed in range(10):
        affines = draw(seed, (120, 120, 120), crop_size, NEVER, ALWAYS)
        points, inside = alignment_points(affines, crop_size, (6, 6, 6), (2, 2, 2), (8, 8, 8))
        reach = ((points >= 3.5 - 2e-3) & (points <= 59.5 + 2e-3)).all(-1).all(-1)  # [2, cells]
        assert torch.equal(reach.all(0), inside)
        assert not inside.all()


def test_views_without_a_common_cell_compare_nothing():
    eye = torch.eye(3, 4).double()
    far = eye.clone()
    far[0, 3] = 1000
    points, inside = alignment_points(torch.stack((eye, far)), (32, 32, 32), (2, 2, 2), (2, 2, 2), (8, 8, 8))
    assert not inside.any()
    assert points.isfinite().all()


@pytest.mark.parametrize(("wrong", "least"), [("axes", 0.5), ("corners", 0.5), ("rounding", 0.1)])
def test_the_published_mistakes_would_be_noticed(wrong, least):
    crop_size = (96, 64, 80)
    affines = draw(3, (257, 257, 257), crop_size, NEVER)
    points, _ = alignment_points(affines, crop_size, (7, 7, 7), (2, 2, 2), (8, 8, 8))
    if wrong == "axes":
        points = points.flip(-1)
    elif wrong == "corners":  # align_corners=True: the box is stretched to the centres of the outermost cells
        points = (points + 0.5) * (1 - 8 / torch.tensor(crop_size)) + 3.5
    else:
        affines[0, :, 3] += 0.5
    cells = cells_of_field(affines, crop_size, 8, points)
    assert (cells[0] - cells[1]).abs().mean() > least


def test_to_crop_inverts_the_affine():
    affine = draw(1, (60, 70, 80), (32, 48, 40), ALWAYS, ALWAYS)[0]
    index = torch.rand(50, 3).double() * 30
    torch.testing.assert_close(to_crop(affine, to_volume(affine, index)), index)
