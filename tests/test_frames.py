"""The frame that patients share, and crops of the same place in two of them."""

import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, blobs, prepared, save_nifti
from scipy.ndimage import affine_transform
from scipy.spatial.transform import Rotation

from align_volumes import align_all
from data.alignment import Numbers
from data.demo import demo_volume
from data.frames import NAME, carry, compose, frames_by_moments, inverse, pair_views, read_frames, write_frames
from data.manifest import FOR_RUNS, read_manifest
from data.moments import frames_of_moments
from data.nifti import read_image
from data.store import PreparedVolumes
from data.stored_volume import HeldVolume
from data.stream import MicroBatches, SampleStream, make_loader
from data.views import draw_turn
from train_cva import DEMO, CVARecipe, build_model
from training import run_data
from training.recipe import load_recipe

STILL = {"mirror": 0.0, "rotation": {"probability": 0.0, "degrees": (0.0,) * 3}, "zoom": {"probability": 0.0}}
STILL["zoom"]["range"] = (0.7, 1.4)
TURNED = {
    "mirror": 0.5,
    "rotation": {"probability": 1.0, "degrees": (30.0, 30.0, 30.0)},
    "zoom": {"probability": 1.0, "range": (0.7, 1.4)},
}


@pytest.fixture(scope="module")
def ready(volumes, tmp_path_factory) -> PreparedVolumes:
    return prepared(volumes, tmp_path_factory.mktemp("ready"))


def gaussian(shape, centre, widths) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.exp(-(((grid - centre) / widths) ** 2).sum(-1)).astype(np.float32) - 0.3


def test_the_moments_of_the_foreground_are_the_same_in_every_frame():
    for orientation, extent in {"RAS": (40, 50, 40), "LPS": (40, 50, 40), "ASR": (50, 40, 40)}.items():
        voxels = gaussian((60, 50, 40), (25, 30, 18), (15, 11, 9))
        volume = HeldVolume(voxels, spacing=(1, 1, 2), orientation=orientation)
        places = carry(volume.volume_to_frame, np.argwhere(voxels > 0))
        np.testing.assert_allclose(places.mean(0), 0, atol=2)
        np.testing.assert_allclose(places.std(0), extent, rtol=0.05)


def test_a_volume_without_foreground_and_a_flat_one_have_a_frame():
    for voxels in (np.zeros((9, 9, 9), np.float32), np.ones((9, 9, 1), np.float32)):
        frame = HeldVolume(voxels).volume_to_frame
        assert np.isfinite(frame).all()
        assert np.linalg.det(frame[:, :3]) > 0


def test_prepared_volumes_and_the_same_in_memory_have_the_same_frame(ready):
    for volume in ready:
        held = HeldVolume(volume[:, :, :], volume.padding, volume.spacing, volume.foreground_threshold)
        np.testing.assert_allclose(volume.volume_to_frame, held.volume_to_frame, rtol=1e-6)
    assert np.array_equal(ready.frames.level, [0, 0, 0])


def test_a_part_of_the_volumes_has_their_frames_and_the_columns_of_runs_suffice(ready):
    some = PreparedVolumes(read_manifest(ready.manifest.folder, FOR_RUNS), [2, 0])
    assert np.array_equal(some[0].volume_to_frame, ready[2].volume_to_frame)
    assert np.array_equal(some[1].volume_to_frame, ready[0].volume_to_frame)


def test_channels_lie_where_the_first_that_is_there_does(tmp_path):
    for name, seed in (("sub-1/anat/sub-1_T1w", 0), ("sub-1/anat/sub-1_T2w", 1), ("sub-2/anat/sub-2_T2w", 2)):
        save_nifti(tmp_path / f"raw/{name}.nii", blobs(seed))
    volumes = prepared(tmp_path / "raw", tmp_path / "ready", channels=("T1w", "T2w"))
    rows = read_frames(volumes.manifest).volume_to_frame
    for number, (volume, first) in enumerate(zip(volumes, (0, 2))):
        assert np.array_equal(volume.volume_to_frame, rows[first]), number
    pair_views(np.random.default_rng(0), [*volumes], np.eye(3), [np.eye(3)] * 2, (16, 16, 16), 0.0, 4.0)


def test_frames_on_the_disk_are_those_of_their_volumes_alone(ready, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(ready.manifest.folder, folder)
    manifest = read_manifest(folder)
    frames = read_frames(manifest)
    moved = frames._replace(volume_to_frame=frames.volume_to_frame + 1.0, level=frames.level + 1)
    write_frames(manifest, moved, encoder="none")
    assert read_frames(manifest).fingerprint() == moved.fingerprint() != frames.fingerprint()
    assert np.array_equal(PreparedVolumes(manifest)[1].volume_to_frame, moved.volume_to_frame[1])
    assert read_frames(manifest).words() == "3 of 3 volumes aligned by features"

    (folder / NAME).write_bytes((folder / NAME).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is damaged .*run align_volumes.py again, or remove it"):
        read_frames(manifest)
    written = write_frames(manifest, moved)
    save_nifti(tmp_path / "other/d.nii", blobs(3))
    other = prepared(tmp_path / "other", tmp_path / "there")
    shutil.copy(written, other.manifest.folder)
    assert other[0][:2, :2, :2].shape == (2, 2, 2)  # who uses no frames does not care
    with pytest.raises(ValueError, match=r"is of other volumes than .* has now: run align_volumes.py again, or remove"):
        _ = other[0].volume_to_frame


# --------------------------------------------------------------------------- pairs of crops

SIZE = (12, 10, 8)


def two_patients() -> list[HeldVolume]:
    return [
        HeldVolume(gaussian((60, 50, 40), (28, 26, 20), (22, 18, 15))),
        HeldVolume(gaussian((50, 56, 30), (24, 30, 14), (19, 20, 10)), spacing=(1.0, 1.0, 1.5)),
    ]


def centres(views: np.ndarray) -> np.ndarray:
    return views[:, :, :3] @ ((np.array(SIZE) - 1) / 2) + views[:, :, 3]


@pytest.mark.parametrize("turn", [STILL, TURNED], ids=["still", "turned"])
def test_both_crops_show_what_the_frames_call_the_same_place(turn):
    a, b = two_patients()
    apart, found = [], []
    for number in range(200):
        rng = np.random.default_rng(number)
        shared = draw_turn(rng, turn, a.spacing)
        views = pair_views(rng, [a, b], shared, [np.eye(3)] * 2, SIZE, 0.0, 0.0)
        first, second = centres(views)
        found.append(a.voxels[tuple(np.round(first).astype(int))] > 0)
        linear = np.array([a.spacing, b.spacing])[:, :, None] * views[:, :, :3]
        np.testing.assert_allclose(linear[1], linear[0], atol=1e-12)  # the same in mm
        apart.append(np.abs(carry(a.volume_to_frame, first) - carry(b.volume_to_frame, second)))
    assert np.mean(found) > 0.97
    scale = np.diag(b.volume_to_frame[:, :3])
    apart = np.array(apart) / scale  # in voxels of the second
    assert np.median(apart) <= 0.3
    assert (apart.max(axis=1) <= 0.501).mean() > (0.9 if turn is STILL else 0.5)  # the others were moved inside


def test_crops_that_are_not_turned_are_copies():
    a, _ = two_patients()
    for number in range(50):
        rng = np.random.default_rng(number)
        mirror = np.diag(np.where(rng.random(3) < 0.5, -1.0, 1.0))
        views = pair_views(rng, [a, two_patients()[0]], mirror, [np.eye(3)] * 2, SIZE, 0.25, 4.0)
        assert np.array_equal(views[:, :, 3], np.round(views[:, :, 3]))


def test_jitter_is_in_mm_and_a_single_volume_is_its_own_partner():
    _, b = two_patients()
    moves = []
    for number in range(1000):
        views = pair_views(np.random.default_rng(number), [b], np.eye(3), [np.eye(3)] * 2, SIZE, 0.0, 4.0)
        first, second = centres(views)
        free = np.array(b.shape) - SIZE
        low = second - np.array(SIZE) / 2 + 0.5
        at_the_end = (low <= -np.array(SIZE) / 6 + 1) | (low >= free + np.array(SIZE) / 6 - 1)
        moves.append(np.where(at_the_end, np.nan, (second - first) * b.spacing))
    np.testing.assert_allclose(np.nanstd(moves, axis=0)[:2], 4.0, rtol=0.1)


def test_at_least_half_of_a_crop_lies_in_its_volume_whatever_the_frames_say():
    a, b = two_patients()
    grid = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij")).reshape(3, -1)
    for number in range(100):
        rng = np.random.default_rng(number)
        b.volume_to_frame = frames_of_moments(rng.uniform(-30, 80, 3), rng.uniform(3, 20, 3), "RAS")
        shared = draw_turn(rng, TURNED, a.spacing)
        _, second = pair_views(rng, [a, b], shared, [np.eye(3)] * 2, SIZE, 0.0, 4.0)
        places = carry(second, grid.T)
        assert ((places > -0.5) & (places < np.array(b.shape) - 0.5)).all(1).mean() >= 0.45  # a voxel is cut or not


def test_a_crop_larger_than_the_volumes_is_centred():
    a, b = two_patients()
    views = pair_views(np.random.default_rng(0), [a, b], np.eye(3), [np.eye(3)] * 2, (128, 128, 128), 0.0, 4.0)
    for view, volume in zip(views, (a, b)):
        centre = view[:, :3] @ np.full(3, 63.5) + view[:, 3]
        np.testing.assert_allclose(centre, (np.array(volume.shape) - 1) / 2, atol=1)


def test_own_turns_leave_centres_where_they_are():
    rng = np.random.default_rng(0)
    own = [draw_turn(rng, TURNED), draw_turn(rng, TURNED)]
    still, turned = (
        pair_views(np.random.default_rng(5), two_patients(), np.eye(3), turns, SIZE, 0.0, 4.0)
        for turns in ([np.eye(3)] * 2, own)
    )
    np.testing.assert_allclose(centres(still), centres(turned), atol=1e-9)
    np.testing.assert_allclose(turned[:, :, :3], still[:, :, :3] @ own, atol=1e-12)


def test_a_pair_depends_on_its_number_alone(ready):
    draw = partial(pair_views, crop_size=(16, 16, 16), overhang=0.0, jitter=4.0)
    sizes = {"crop_size": (16, 16, 16), "coarsest_last": False, "interpolation": "linear", "intensity": {}}
    numbers = sizes | {"shared": TURNED, "independent": TURNED, "mask_block": 8, "mask_ratio": 0.5}
    make = lambda: SampleStream(ready, 0, **numbers, views=2, draw=draw, patients=2)  # noqa: E731
    one = list(make_loader(make(), MicroBatches(0, 4, 2, 1, 0, 1), 0, False))
    two = list(make_loader(make(), MicroBatches(0, 4, 2, 1, 0, 1), 2, False))
    for ours, theirs in zip(one, two):
        assert torch.equal(ours["crop_to_volume"], theirs["crop_to_volume"])
    rank = [list(make_loader(make(), MicroBatches(2, 4, 2, 1, rank, 2), 0, False)) for rank in (0, 1)]
    for number, whole in enumerate(one[2:]):
        parts = torch.stack([rank[r][number]["crop_to_volume"] for r in (0, 1)], dim=1).flatten(0, 1)
        assert torch.equal(parts, whole["crop_to_volume"])


def test_the_partner_is_of_another_subject(tmp_path):
    for name in ("sub-01/ses-1/a.nii", "sub-01/ses-2/a.nii", "sub-01/ses-3/a.nii", "sub-02/ses-1/a.nii"):
        save_nifti(tmp_path / "raw" / name, blobs(0, (20, 20, 20)))
    several = prepared(tmp_path / "raw", tmp_path / "ready")
    sizes = {"crop_size": (16, 16, 16), "coarsest_last": False, "interpolation": "linear", "intensity": {}}
    numbers = sizes | {"shared": STILL, "independent": STILL, "mask_block": 8, "mask_ratio": 0.5}
    draw = partial(pair_views, crop_size=(16, 16, 16), overhang=0.0, jitter=4.0)
    alone = PreparedVolumes(several.manifest, [n for n, subject in enumerate(several.subjects) if subject == 0])
    for volumes in (several, alone, [HeldVolume(blobs(n, (20, 20, 20))) for n in range(2)]):
        stream = SampleStream(volumes, 0, **numbers, views=2, draw=draw, patients=2)
        pairs = [stream._choose(np.random.default_rng(seed)) for seed in range(50)]
        assert {first for first, _ in pairs} == set(range(len(volumes)))
        for first, second in pairs:
            assert first != second
            assert volumes is not several or several.subjects[first] != several.subjects[second]
        assert stream[3]["group"].unique().numel() == (2 if volumes is several else 1)
    itself = SampleStream([HeldVolume(blobs(0, (20, 20, 20)))], 0, **numbers, views=2, draw=draw, patients=2)
    assert itself._choose(np.random.default_rng(0)) == [0, 0]


def test_crops_tell_where_they_lie_in_the_frame(ready):
    sizes = {"crop_size": (16, 16, 16), "coarsest_last": False, "interpolation": "linear", "intensity": {}}
    numbers = sizes | {"shared": TURNED, "independent": TURNED, "mask_block": 8, "mask_ratio": 0.5}
    draw = partial(pair_views, crop_size=(16, 16, 16), overhang=0.0, jitter=0.0)
    stream = SampleStream(ready, 0, **numbers, views=2, draw=draw, patients=2)
    for number in range(4):
        sample, places = stream[number], torch.rand(20, 3, dtype=torch.float64) * 15
        files = stream._choose(np.random.default_rng(stream._seed(number, "geometry")))
        for view, file in enumerate(files):
            in_volume = carry(sample["crop_to_volume"][view].numpy(), places.numpy())
            found = carry(sample["crop_to_frame"][view].numpy(), places.numpy())
            np.testing.assert_allclose(found, carry(ready.frames.volume_to_frame[file], in_volume), atol=1e-3)


class WithFrames(CVARecipe):
    @property
    def uses_frames(self) -> bool:
        return True


def test_other_frames_are_other_data_to_the_runs_that_use_them(ready, tmp_path, monkeypatch):
    folder = tmp_path / "ready"
    shutil.copytree(ready.manifest.folder, folder)
    monkeypatch.setattr(run_data, "from_main_rank", lambda _, make: make())
    launch = SimpleNamespace(targets=None, streams=False, data=folder, prepared=None, resume=True, labels=None)
    recipe = load_recipe(DEMO, TINY, CVARecipe)
    with_frames = load_recipe(DEMO, TINY, WithFrames)
    print_nothing = lambda _: None  # noqa: E731

    def data(recipe):
        return run_data.open_data(launch, recipe, None, print_nothing).facts["data"]

    assert data(recipe) == ready.manifest.fingerprint()
    by_moments = data(with_frames)
    frames = frames_by_moments(ready.manifest)
    write_frames(read_manifest(folder), frames._replace(volume_to_frame=frames.volume_to_frame * 1.1))
    assert data(recipe) == ready.manifest.fingerprint()
    assert data(with_frames) != by_moments
    (folder / NAME).unlink()
    assert data(with_frames) == by_moments


# --------------------------------------------------------------------------- patients made of one template


def patient(template: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The template turned up to 10 degrees about each axis, zoomed by up to a tenth along each, of another contrast;
    and the affine `[3, 4]` from its voxels to the template's."""
    matrix = Rotation.from_euler("xyz", rng.uniform(-10, 10, 3), degrees=True).as_matrix() * rng.uniform(0.9, 1.1, 3)
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in template.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    ends = corners @ np.linalg.inv(matrix).T
    low = ends.min(0)
    shape = np.ceil(ends.max(0) - low).astype(int) + 1
    affine = np.column_stack((matrix, matrix @ low))
    voxels = affine_transform(template, matrix, affine[:, 3], tuple(shape), order=1)
    return (1000 * (voxels / template.max()).clip(0) ** rng.uniform(0.7, 1.5)).astype(np.int16), affine


Patients = tuple[PreparedVolumes, list[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def patients(tmp_path_factory) -> Patients:
    """The template and 20 patients, prepared; affines from their voxels to the template's; places of its brain."""
    folder, rng = tmp_path_factory.mktemp("patients"), np.random.default_rng(0)
    template = F.avg_pool3d(torch.from_numpy(read_image(demo_volume(), "RAS").voxels)[None], 3)[0].numpy()
    made = [(template.astype(np.int16), np.eye(3, 4)), *(patient(template, rng) for _ in range(20))]
    for number, (voxels, _) in enumerate(made):
        save_nifti(folder / f"raw/{number:02d}.nii", voxels, (3.0, 3.0, 3.0))
    volumes = prepared(folder / "raw", folder / "ready", spacing=(3.0, 3.0, 3.0))
    to_source = volumes.manifest.volumes["prepared_to_source"].to_pylist()
    affines = [compose(affine, np.reshape(there, (3, 4))) for (_, affine), there in zip(made, to_source)]
    return volumes, affines, np.argwhere(template > 0.2 * template.max()).astype(float)


def errors(patients: Patients, frames: np.ndarray | None) -> np.ndarray:
    """Mean mm by which places of each patient are carried past where they are in the template, `[20]`."""
    _, affines, places = patients
    here = [carry(inverse(affine), places) for affine in affines]
    ways = [np.eye(3, 4)] * 21 if frames is None else [compose(inverse(frames[0]), frame) for frame in frames]
    return 3 * np.array([np.linalg.norm(carry(w, p) - here[0], axis=1).mean() for w, p in zip(ways[1:], here[1:])])


def test_level_0_is_nearer_than_the_same_voxel_is(patients):
    same_voxel, moments = errors(patients, None), errors(patients, frames_by_moments(patients[0].manifest)[0])
    print(same_voxel, moments)
    assert moments.mean() < 10
    assert (moments < same_voxel).all()


@pytest.mark.slow
def test_level_1_is_nearer_than_level_0(patients):
    """The encoder is not even trained: it is one image, warped. What training adds is seen on real patients alone."""
    volumes = patients[0]
    cells_of_12_mm = ["model.patch_size=4", "mask.block=4", "data.spacing=[3.0,3.0,3.0]", "views.cells=[5,5,5]"]
    recipe = load_recipe(DEMO, [*TINY, *cells_of_12_mm], CVARecipe)
    encoder = build_model(recipe).student.features.encoder.eval()
    frames, found = align_all(volumes, encoder, 0, recipe.views.crop_size, 8, Numbers())
    level_0, level_1 = errors(patients, frames_by_moments(volumes.manifest)[0]), errors(patients, frames[0])
    print(level_0, level_1)
    assert not any(one.reason for one in found)
    assert level_1.mean() < 4
    assert (level_1 < level_0 + 1).all()
