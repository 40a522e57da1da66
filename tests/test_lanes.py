"""Lanes: pretraining straight from a streamed data set."""

import gc
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import count, islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import blobs, prepared, save_nifti
from test_stream import make_stream

import data.rows
from data import lanes as module
from data.hub import HubDataset
from data.lane_loader import first_state, join_states, make_lane_loader, put_state, state_of_rank
from data.lanes import Lanes
from data.manifest import Preparation
from data.rows import number_of
from data.split import is_left_out
from data.stored_volume import HeldVolume
from data.stream import MicroBatches

ROUNDS, SIZE = 4, 2
LANES = ROUNDS * SIZE
FEATURES = datasets.Features({"scan": datasets.Nifti(), "subject": datasets.Value("string")})
SMALL = {"crop_size": (8, 8, 8), "mask_block": 4, "cells": (2, 2, 2), "samples_per_cell": (1, 1, 1)}


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The bytes of a NIfTI file of some voxels."""
    folder = tmp_path_factory.mktemp("images")

    def image(voxels):
        return save_nifti(folder / "image.nii", voxels).read_bytes()

    return image


@pytest.fixture(scope="session")
def streamed(tmp_path_factory, image):
    """A data set of files of so many rows, volume after volume of subjects of two volumes; others for some numbers."""
    known = {}

    def streamed(*rows_of_files, others=None, fewest=0):
        key = rows_of_files, tuple((others or {}).items())
        if key not in known:
            known[key] = tmp_path_factory.mktemp("streamed")
            numbers = count()
            for file, size in enumerate(rows_of_files):
                rows = []
                for number in islice(numbers, size):
                    content = others[number] if number in (others or {}) else image(blobs(number, (24, 24, 24)))
                    scan = None if content is None else {"path": f"{number}.nii", "bytes": content}
                    rows.append({"scan": scan, "subject": f"s{number // 2:03}"})
                path = known[key] / f"train-{file:05}.parquet"
                datasets.Dataset.from_list(rows, FEATURES).to_parquet(path, batch_size=3)
        return HubDataset(str(known[key]), fewest)

    return streamed


def lanes_of(data, **changes):
    stream = make_stream([None], 7, **SMALL)
    how = {"rounds": ROUNDS, "buffer": 3, "samples_per_volume": 2}
    return Lanes(data, Preparation("RAS", (1.0, 1.0, 1.0)), stream, **{**how, **changes})


def batches_of(lanes, first=0, last=12, state=None, workers=0, rank=0, ranks=1):
    if state is None:
        state = first_state(lanes.rounds * SIZE // ranks, lanes.buffer)
    batches = MicroBatches(first, last, SIZE, 1, rank, ranks)
    loader = iter(make_lane_loader(lanes, batches, state, workers, pin_memory=False))
    try:
        return list(loader)
    finally:
        if workers:  # which heed no signal; an error that is caught keeps the loader
            loader._shutdown_workers()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.isnan(), b.isnan()) and same_numbers(a, b))
    return len(a) == len(b) and all(same(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b))


def same_numbers(a, b):
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        assert [key for key in batch if not same(batch[key], other[key])] == []


@pytest.fixture
def seen(monkeypatch):
    """The paths of what is read, where it was met, and of which volume each sample was made."""
    seen = SimpleNamespace(met=[], used=[], volumes=weakref.WeakKeyDictionary(), most=0)
    serial = count()
    held, prepare_row = module.Lane._held, module.prepare_row

    def note_row(lane, where, source, content, unreadable):
        seen.met.append((lane.number, where[0], source.path))
        return held(lane, where, source, content, unreadable)

    def note_volume(source, content, how):
        volume = prepare_row(source, content, how)
        seen.volumes[volume] = next(serial)
        seen.most = max(seen.most, len(seen.volumes))
        return volume

    monkeypatch.setattr(module.Lane, "_held", note_row)
    monkeypatch.setattr(module, "prepare_row", note_volume)
    return seen


def noting(lanes, seen):
    """The same lanes, whose samples are noted."""
    sample_of = lanes.stream.sample_of

    def note(index, volumes, groups):
        seen.used.append((index, seen.volumes[volumes[0]]))
        return sample_of(index, volumes, groups)

    lanes.stream.sample_of = note
    return lanes


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a small machine
@pytest.mark.parametrize("files", [(3,) * 9, (9, 8)])
def test_neither_loader_processes_nor_ranks_change_a_sample(streamed, files):
    lanes = lanes_of(streamed(*files))
    expected = batches_of(lanes)
    for workers in (1, 2, 4):
        assert_same(batches_of(lanes, workers=workers), expected)
    parts = [batches_of(lanes, rank=rank, ranks=2, workers=rank) for rank in range(2)]
    for *of_ranks, whole in zip(*parts, expected):
        for key in ("mask", "points", "pair", "group"):
            halves = [part[key].unflatten(0, (2, -1)) for part in of_ranks]
            assert torch.equal(torch.cat(halves, dim=1).flatten(0, 1), whole[key])
        assert same([part["block"][view] for view in range(2) for part in of_ranks], whole["block"])
        assert torch.equal(torch.cat([part["lanes"] for part in of_ranks]), whole["lanes"])


@pytest.mark.parametrize(("files", "buffer"), [((2,) * 9, 1), ((1, 2) * 5, 3), ((9, 8), 2)])
def test_stopped_at_a_batch_it_goes_on_with_the_same_samples(streamed, files, buffer):
    """Before lanes are full and after, and across ends of epochs: a lane has 2 volumes in one, and 4 samples."""
    lanes, last = lanes_of(streamed(*files), buffer=buffer, samples_per_volume=min(buffer, 2)), 16
    expected = batches_of(lanes, last=last)
    assert max(int(batch["lanes"][:, 0].max()) for batch in expected) >= 1
    state = first_state(LANES, buffer)
    for number, batch in enumerate(expected):
        if number % 3 == 1:  # at each of the 4 rounds
            assert_same(batches_of(lanes, number, min(last, number + 3), state), expected[number : number + 3])
        if number in (5, 11):
            assert_same(batches_of(lanes, number, last, state, workers=2), expected[number:])
        state = put_state(state, batch["lanes"], number)


def test_it_goes_on_with_other_ranks(streamed):
    lanes = lanes_of(streamed(*(3,) * 9))
    expected = batches_of(lanes, last=14)
    states = [first_state(ROUNDS, lanes.buffer) for _ in range(2)]
    for rank in range(2):
        for number, batch in enumerate(batches_of(lanes, last=7, rank=rank, ranks=2)):
            states[rank] = put_state(states[rank], batch["lanes"], number)
    whole = join_states(states, ROUNDS)
    assert all(torch.equal(state_of_rank(whole, ROUNDS, rank, 2), states[rank]) for rank in range(2))
    assert_same(batches_of(lanes, 7, 14, whole), expected[7:])


@pytest.mark.parametrize(
    ("files", "fewest"), [((2,) * 11, 0), ((1, 4, 2) * 4, 0), ((13, 4), 0), ((23,), 0), ((23,), LANES)]
)
def test_each_epoch_meets_every_volume_once(streamed, seen, files, fewest):
    """Over all lanes, each of which begins its epochs by itself; in an order of its own."""
    lanes = lanes_of(streamed(*files, fewest=fewest), buffer=1, samples_per_volume=1)
    batches_of(lanes, last=40)
    begun = {lane: max(epoch for number, epoch, _ in seen.met if number == lane) for lane in range(LANES)}
    assert min(begun.values()) >= 1
    for epoch in range(min(begun.values())):
        met = Counter(path for _, of, path in seen.met if of == epoch)
        assert len(met) == sum(files)
        assert set(met.values()) == {1}
    first, second = ([path for _, of, path in seen.met if of == epoch] for epoch in range(2))
    assert first != second


def test_a_volume_gives_its_samples_and_makes_room(streamed, seen):
    lanes = noting(lanes_of(streamed(*(6,) * LANES), samples_per_volume=3), seen)
    state = first_state(LANES, lanes.buffer)
    for number, batch in enumerate(batches_of(lanes, last=15 * ROUNDS)):
        state = put_state(state, batch["lanes"], number)
    held = state[:, 6::4]  # how many samples each in memory gave
    uses = Counter(Counter(volume for _, volume in seen.used).values())
    assert (uses[1], uses[2]) == (int((held == 1).sum()), int((held == 2).sum()))
    assert uses.keys() == {1, 2, 3}
    assert uses[3] > LANES
    for lane in range(LANES):  # mixed, not one after the other
        order = [volume for index, volume in seen.used if index % LANES == lane]
        assert order != sorted(order, key=order.index)


def test_no_more_volumes_are_in_memory_than_asked_for(streamed, seen):
    lanes = lanes_of(streamed(*(3,) * LANES), buffer=2, samples_per_volume=9)
    batches_of(lanes, last=20 * ROUNDS)
    assert seen.most == 2 * LANES


def test_a_volume_in_memory_is_that_of_a_folder(streamed, tmp_path):
    lanes = lanes_of(streamed(1))
    source, fetch = next(lanes.data.read(0))
    volume = data.rows.prepare_row(source, fetch(), lanes.preparation)
    path = save_nifti(tmp_path / "folder" / "a.nii", blobs(0, (24, 24, 24)))
    (stored,) = prepared(path, tmp_path / "prepared")
    everything = (slice(None),) * 3
    assert volume.shape == stored.shape
    assert volume.spacing == (1.0, 1.0, 1.0)
    assert volume.padding == stored.padding
    assert volume[everything].dtype == np.float16
    assert np.array_equal(volume[everything], stored[everything])


def test_what_is_no_volume_is_passed_over_and_bad_ones_are_named(streamed, image):
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[4:20, 4:20, 4:20] = 1
    labels[10:16, 10:16, 10:16] = 2
    others = {1: b"no image at all", 4: image(labels), 7: image(np.full((24, 24, 24), 3, np.int16))}
    lanes = lanes_of(streamed(*(3,) * LANES, others=others), buffer=1, samples_per_volume=1)
    batches = batches_of(lanes, last=4 * ROUNDS)
    lines = [line for batch in batches for line in batch["unreadable"]]
    assert any("/000001/1.nii cannot be used (not a readable NIfTI file" in line for line in lines)
    assert {line.split("/")[-1].split()[0] for line in lines} == {"1.nii", "7.nii"}
    assert all(line.startswith("sample ") for line in lines)
    groups = {int(group) for batch in batches for group in batch["group"]}
    assert len(groups) == 12  # all subjects: each has a good volume


def test_a_row_without_a_volume_is_a_bad_one(streamed):
    """Also for the count of rows, by which a run goes on."""
    lanes = lanes_of(streamed(*(3,) * LANES, others={n: None for n in range(0, 24, 3)}), buffer=2, samples_per_volume=2)
    expected = batches_of(lanes, last=3 * ROUNDS)
    assert any("cannot be used" in line for batch in expected for line in batch["unreadable"])
    state = first_state(LANES, 2)
    for number, batch in enumerate(expected):
        if number in (2, 5, 9):
            assert_same(batches_of(lanes, number, 3 * ROUNDS, state), expected[number:])
        state = put_state(state, batch["lanes"], number)


def test_subjects_that_are_left_out_are(streamed, seen):
    data = streamed(*(2,) * LANES)
    lanes = lanes_of(data, leave_out=("s00[0-3]", f"{data.name}/s006"))
    batches = batches_of(lanes, last=4 * ROUNDS)
    left = {number_of(f"{data.name}/s{number:03}") for number in (4, 5, 7)}
    assert {int(group) for batch in batches for group in batch["group"]} == left
    assert not any(batch["unreadable"] for batch in batches)


def test_patterns_fit_as_those_of_a_split():
    assert is_left_out("set/sub-1", ["sub-1"])
    assert is_left_out("set/sub-1", ["set/*"])
    assert is_left_out("train/00000/000001/a.nii", ["a.nii"])
    assert not is_left_out("set/sub-1", ["sub", "set"])


def test_a_subject_has_one_number_of_63_bits():
    numbers = {number_of(f"set/{n}") for n in range(1000)}
    assert len(numbers) == 1000
    assert 0 <= min(numbers) <= max(numbers) < 2**63
    assert number_of("set/1") == number_of("set/1")


def failing(data, times):
    """The data set, whose rows from the third of a file on fail so many times."""
    rows_from, left = data.rows_from, [times]

    def fail(number, start):
        for index, row in rows_from(number, start):
            if index >= 2 and left[0]:
                left[0] -= 1
                raise ConnectionError("the network is down\nand more")
            yield index, row

    data.rows_from = fail
    return data


def test_a_network_that_fails_is_asked_again(streamed, monkeypatch):
    pauses = []
    monkeypatch.setattr(data.hub.time, "sleep", pauses.append)
    lanes = lanes_of(streamed(*(4,) * LANES))
    expected = batches_of(lanes)
    again = replace(lanes, data=failing(HubDataset(lanes.data.root), 2))
    assert_same(batches_of(again), expected)
    assert pauses == [1.0, 10.0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_is_named(streamed, monkeypatch, workers):
    monkeypatch.setattr(data.hub, "RETRIES", (0.0, 0.0))
    lanes = lanes_of(failing(streamed(*(4,) * LANES), 1000))
    with pytest.raises(OSError, match=r"streamed\d+/train/0000\d/000002 cannot be read \(the network is down\)"):
        batches_of(lanes, workers=workers)


def test_processes_that_do_not_fit_are_refused(streamed):
    with pytest.raises(ValueError, match=r"4 rounds .* 3 loader processes: let run.workers be 0, 1, 2 or 4"):
        batches_of(lanes_of(streamed(2)), workers=3)


def test_the_state_of_other_lanes_is_refused(streamed):
    with pytest.raises(ValueError, match=r"\(8, 11\) is of other lanes than these of \(8, 15\)"):
        batches_of(lanes_of(streamed(2)), state=first_state(LANES, 2))


@pytest.mark.parametrize("files", [(2, 1), (1,) * 9])
def test_a_data_set_without_a_usable_volume_is_an_error(streamed, files):
    lanes = lanes_of(streamed(*files, others=dict.fromkeys(range(9), b"nothing")))
    with pytest.raises(OSError, match=r"streamed\d+: no usable volume in \d+ of its \d files .*\.nii cannot be used"):
        batches_of(lanes)
    with pytest.raises(OSError, match=r"left out$"):
        batches_of(lanes_of(streamed(*files), leave_out=("*",)))


def test_one_usable_volume_is_enough(streamed, seen):
    """Whatever the lane, and however many others it meets first."""
    lanes = lanes_of(streamed(*(1,) * 9, others={n: b"nothing" for n in range(1, 9)}), buffer=1, samples_per_volume=1)
    batches = batches_of(lanes, last=2 * ROUNDS)
    assert len({int(group) for batch in batches for group in batch["group"]}) == 1


def test_of_few_files_groups_of_rows_are_read(streamed, seen):
    """Nobody reads what others make samples of."""
    lanes = lanes_of(streamed(12, 12, fewest=LANES))
    assert len(lanes.data) == LANES
    expected = batches_of(lanes, last=2 * ROUNDS)
    assert {path.split("/")[1] for _, _, path in seen.met} == {f"{number:05}" for number in range(LANES)}
    state = first_state(LANES, lanes.buffer)
    for number, batch in enumerate(expected[:3]):
        state = put_state(state, batch["lanes"], number)
    assert_same(batches_of(lanes, 3, 2 * ROUNDS, state), expected[3:])


def test_a_data_set_has_a_fingerprint(streamed, tmp_path):
    ours, moved = streamed(4, 2), tmp_path / "moved"
    shutil.copytree(ours.root, moved)
    assert HubDataset(str(moved)).fingerprint == ours.fingerprint
    assert streamed(4, 3).fingerprint != ours.fingerprint
    assert HubDataset(ours.root, LANES).fingerprint == ours.fingerprint


def test_a_data_set_that_has_changed_is_noticed(streamed):
    lanes = lanes_of(streamed(*(4,) * 9))
    state = first_state(LANES, lanes.buffer)
    for number, batch in enumerate(batches_of(lanes, last=8)):
        state = put_state(state, batch["lanes"], number)
    for files in ((1,) * 9, (4,)):
        with pytest.raises(OSError, match="is no longer what it was"):
            batches_of(replace(lanes, data=streamed(*files)), 8, 30, state)


def test_blocks_do_not_keep_their_volume():
    volume = HeldVolume(np.ones((24, 24, 24), np.float16), 0.0, (1.0, 1.0, 1.0))
    sample = partial(make_stream([None], 7, **SMALL).sample_of, 3, groups=[1])([volume])
    voxels = weakref.ref(volume.voxels)
    del volume
    gc.collect()
    assert len(sample["block"]) == 2
    assert voxels() is None
