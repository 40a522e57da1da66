"""What would fail hours into a run is caught, and the remedy is named."""

import collections
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ROOT, TINY, blobs, config, save_nifti

import train_cva
from planning import late_checks
from planning.dry_run import dry_run
from planning.plan import checkpoint_bytes, memory, weights_of
from training.estimate import noise_batch, step_cost
from training.launch import Launch
from training.recipe import load_recipe
from training.run_folder import RunFolder
from training.strategy import read_strategy

DEMO = ROOT / "recipes" / "demo.yaml"


@pytest.fixture
def check(tmp_path, capsys):
    recipe, strategy = load_recipe(DEMO, TINY, train_cva.CVARecipe), read_strategy(config("zero2"))
    weights = weights_of(train_cva.build_model(recipe))
    save_nifti(tmp_path / "data" / "a.nii", blobs(0))
    usual = {
        "launch": Launch(
            strategy,
            RunFolder(tmp_path / "run"),
            tmp_path / "run" / "prepared",
            tmp_path / "data",
            streams=False,
            labels=None,
            targets=None,
            data_description=None,
            init_from=None,
            token_order=None,
            resume=False,
            wandb=False,
            ranks=2,
            volumes=2,
            is_first=True,
        ),
        "recipe": recipe,
        "weights": weights,
        "memory": memory(weights, recipe, strategy, 2, [(0, 1e6)]),
    }

    def run(memory=usual["memory"], **changed):
        launch = replace(usual["launch"], **changed)
        passed = late_checks.check_late_failures(launch, recipe, weights, memory, crops=4)
        lines = capsys.readouterr().out.splitlines()
        assert all(line.startswith(("ok ", "FAILS ")) for line in lines)
        failed = [line for line in lines if line.startswith("FAILS ")]
        assert passed == (not failed)
        return failed

    run.usual = usual
    return run


def test_all_is_well(check, tmp_path):
    assert check() == []
    assert [p.name for p in tmp_path.iterdir()] == ["data"]  # nothing is left behind


def test_a_batch_that_does_not_divide(check):
    (line,) = check(ranks=3)
    assert "set train.batch_size=3" in line


def test_files_that_cannot_be_read(check, tmp_path):
    (tmp_path / "data" / "b.nii.gz").write_bytes(b"no volume")
    (line,) = check()
    assert "1 of 2 files" in line
    assert "b.nii.gz" in line
    assert "raise data.max_bad_share" in line
    (line,) = check(data=tmp_path / "nowhere")
    assert "no such folder" in line


def test_a_folder_that_cannot_be_written(check, tmp_path):
    (tmp_path / "file").write_text("")  # also root cannot write below a file
    lines = check(folder=RunFolder(tmp_path / "file" / "run"))
    assert len(lines) == 1
    assert "--output" in lines[0]
    assert "choose another folder" in lines[0]


def test_a_disk_without_room(check, monkeypatch):
    usual = check.usual
    needed = 3 * checkpoint_bytes(usual["weights"], usual["recipe"])
    volumes = 2 * 40 * 44 * 36  # in half precision
    usage = collections.namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed + volumes))
    assert check() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed + volumes - 1))
    (line,) = check()
    assert "GB free on its disk" in line
    assert "choose another folder" in line


def test_shared_memory_too_small_for_the_loaders(tmp_path, monkeypatch):
    recipe = load_recipe(DEMO, [*TINY, "run.workers=3"], train_cva.CVARecipe)
    needed = 2 * 3 * 2 * 4 * 4 * 32**3  # ranks, workers, batches ready, crops, bytes, voxels
    usage = collections.namedtuple("Usage", "total")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed))
    assert "shared memory for" in late_checks.check_shared_memory(recipe, 4, 2, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(needed - 1))
    with pytest.raises(ValueError, match=r"has 6 MB.* at least 6 MB.*--shm-size.*lower run\.workers"):
        late_checks.check_shared_memory(recipe, 4, 2, tmp_path)
    recipe.run.workers = 0
    assert "needs no" in late_checks.check_shared_memory(recipe, 4, 2, tmp_path)


def test_a_tracker_that_is_not_there(check, monkeypatch):
    there = late_checks.find_spec
    monkeypatch.setattr(late_checks, "find_spec", lambda name: None if name == "wandb" else there(name))
    (line,) = check(wandb=True)
    assert "pip install wandb" in line
    library = type(sys)("wandb")
    library.api = type("Api", (), {"api_key": None})()
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.setattr(late_checks, "find_spec", lambda name: True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (line,) = check(wandb=True)
    assert "wandb login" in line
    library.api.api_key = "key"
    assert check(wandb=True) == []
    monkeypatch.setattr(late_checks, "find_spec", lambda name: None)
    (line,) = check()
    assert "pip install tensorboard" in line


def test_a_host_too_small_to_offload(check):
    (line,) = check(memory={**check.usual["memory"], "host": 1e18})
    assert "offload less" in line


def test_a_gpu_that_is_too_small(check, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    small = type("Properties", (), {"total_memory": 1e6})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    (line,) = check()
    assert "run.gradient_checkpointing=true" in line


def test_the_whole_plan_at_once(check, capsys):
    usual = check.usual
    recipe, launch = usual["recipe"], usual["launch"]
    model = train_cva.build_model(recipe)
    noise = partial(noise_batch, train_cva.build_stream, train_cva.make_batch, recipe)
    cost = step_cost(model, noise(), 2)
    assert dry_run(launch, recipe, model, cost, noise)
    shown = capsys.readouterr().out
    assert "measured on this cpu" in shown
    assert shown.count("\nok  ") == 9
    assert not dry_run(replace(launch, ranks=3), recipe, model, cost, noise, tflops=100)
    assert "given" in capsys.readouterr().out
