"""Maps of labels: prepared, streamed on the affine of their views, checked before they are learned from."""

import numpy as np
import pytest
import torch
from conftest import blobs

from data.stored_volume import HeldVolume
from data.stream import SampleStream, render, stack_views
from data.views import scatter_views

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
