"""What holds for every method: a row of tests/methods.py passes all of these, or it is not in the house."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT, config, launch, whole_state
from methods import ARCHITECTURES, METHODS, batch_of, model_of, noise_of, numbers_of, recipe_of
from test_distributed import difference
from test_gpu import NothingIsReadBack
from test_strategies import Launches

from training.checkpoints import complete_checkpoints
from training.estimate import step_cost
from training.metrics import BOOKKEEPING, read_metrics

CASES = [(name, architecture) for name in METHODS for architecture in ARCHITECTURES]
OTHERS = [name for name in METHODS if METHODS[name].sharded]  # than CVA, which has tests of its own
SHARDED = [(name, strategy) for name in OTHERS for strategy in METHODS[name].sharded]
SAMPLES = 8
ALIKE = "model.drop_path_rate=0"  # drop-path is drawn by rank


# ------------------------------------------------------------------ ranks


def part(data, number, parts):
    """One slice of the samples of a view-major batch."""
    views = len(data["views"]) // SAMPLES
    return {
        key: rows.unflatten(0, (views, -1)).chunk(parts, dim=1)[number].flatten(0, 1).contiguous()
        for key, rows in data.items()
    }


def losses_and_gradients(name, architecture, rank=0, ranks=1):
    recipe = recipe_of(name, architecture, *([ALIKE] if architecture != "resenc" else []))
    model = model_of(name, recipe)
    data = part(batch_of(name, recipe, SAMPLES), rank, ranks)
    losses = model(**data)
    losses["loss"].backward()
    terms = {key: losses[key].detach() for key in ("loss", *model.terms)}
    return terms, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    results = {}
    for case in CASES:
        results[case] = losses_and_gradients(*case, rank, ranks)
        for tensors in results[case]:
            for tensor in tensors.values():  # what data parallel training does
                dist.all_reduce(tensor)
                tensor /= ranks
    if rank == 0:
        torch.save(results, Path(folder) / f"{ranks}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def of_ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(request.param, str(folder)), nprocs=request.param)
    return torch.load(folder / f"{request.param}.pt")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ranks_do_not_change_losses_or_gradients(of_ranks, case):
    losses, gradients = of_ranks[case]
    expected, theirs = losses_and_gradients(*case)
    assert len(expected) > 1
    for name, value in expected.items():  # gaps that nothing has been learned of add up to 1e-10
        assert float((losses[name] - value).abs()) < 1e-5 * float(value.abs()) + 1e-9, name
    assert difference(gradients, theirs) < 1e-5


# ------------------------------------------------------------------ one step


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_step_is_computed_without_reading_back_and_trains_all_that_is_built(case):
    name, architecture = case
    recipe = recipe_of(name, architecture)
    model, data = model_of(name, recipe), batch_of(name, recipe, 3)
    with NothingIsReadBack():
        losses = model(**data)
        losses["loss"].backward()
    assert model.terms.keys() <= losses.keys()
    assert not losses.keys() & {*BOOKKEEPING}
    untrained = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not untrained
    if model.teacher is not None:
        assert not any(p.requires_grad for p in model.teacher.parameters())
    assert losses["crop_is_finite"].all()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_crop_that_is_not_finite_is_told(case):
    name, architecture = case
    recipe = recipe_of(name, architecture)
    model, data = model_of(name, recipe), batch_of(name, recipe, 3)
    bad = data["pair"] == data["pair"][1]
    data["views"] = data["views"].masked_fill(bad[:, None, None, None, None], torch.nan)
    assert torch.equal(model(**data)["crop_is_finite"], ~bad)


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_knows_the_memory_of_a_step(name):
    recipe = recipe_of(name)
    model, samples = model_of(name, recipe).train(), 8
    cost = step_cost(model, noise_of(name, recipe)(), samples)
    data = noise_of(name, recipe)(samples)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # oneDNN's kernels take scratch for each
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(**deepcopy(data))["loss"].backward()  # a tensor that is in the batch twice stays one
    torch.set_num_threads(threads)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    measured = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0).max().item()
    assert max(done + rest for done, rest in cost.timeline) == pytest.approx(measured, rel=0.15)
    assert cost.flops > 1e6


# ------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory, volumes):
    """Of each method: undisturbed under plain data parallel and sharded, stopped and taken up, with a bad sample."""
    launches = Launches(tmp_path_factory.mktemp("methods"), volumes)
    for name in OTHERS:
        numbers, script = [*numbers_of(name, "primus"), ALIKE], METHODS[name].script
        launches.plan(f"{name}_ddp", "ddp", numbers, script=script, draws=True)
        for strategy in METHODS[name].sharded:
            launches.plan(f"{name}_{strategy}", strategy, numbers, script=script)
            launches.plan(f"{name}_{strategy}_stopped", strategy, numbers, script=script, stop_at=2)
            launches.plan(f"{name}_{strategy}_stopped", strategy, numbers, "--resume", "auto", script=script)
        launches.plan(f"{name}_poisoned", METHODS[name].sharded[0], numbers, script=script, poison=[5])
    launches.start("two", 2)
    return launches


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), SHARDED)
def test_a_sharded_run_is_the_plain_one(runs, name, strategy):
    model = model_of(name, recipe_of(name))
    keys = ["loss", *model.terms, "grad_norm"]
    curves = [
        torch.tensor([[record[key] for key in keys] for record in read_metrics(runs.folder / run / "metrics.jsonl")])
        for run in (f"{name}_ddp", f"{name}_{strategy}")
    ]
    torch.testing.assert_close(*curves, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy"), SHARDED)
def test_a_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(runs, name, strategy):
    ends = [
        complete_checkpoints(runs.folder / f"{name}_{strategy}{how}" / "checkpoints")[-1] for how in ("", "_stopped")
    ]
    assert ends[0].name == ends[1].name
    states = [whole_state(end) for end in ends]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_sample_that_is_not_finite_is_skipped_and_named(runs, name):
    records = read_metrics(runs.folder / f"{name}_poisoned" / "metrics.jsonl")
    assert [record["skipped"] for record in records][-1] == 1
    assert "the encoder's features are not finite for samples [5]" in runs.printed["two"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_is_exported_published_and_in_nnunets_form(runs, name, tmp_path):
    run = runs.folder / f"{name}_ddp"
    assert {"losses.png"} < {path.name for path in (run / "report").iterdir()}
    facts = json.loads((run / "encoder" / "pretraining.json").read_text())
    assert facts["losses"].keys() == facts["method"]["terms"].keys()
    launch(run, "--to", tmp_path / "bundle", script=ROOT / "publish.py")
    assert {"checkpoint_final.pth", "adaptation_plan.json"} <= {file.name for file in (tmp_path / "bundle").iterdir()}
    card = " ".join((tmp_path / "bundle" / "README.md").read_text().split())
    for words in facts["method"]["terms"].values():
        assert words in card
    if name != "cva":
        assert "View Alignment" not in card


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_dry_run_of_a_method_is_complete(volumes, tmp_path, name):
    arguments = ["--dry-run", "--data", volumes, "--config", config("zero2"), "--output", tmp_path / "run"]
    script = ROOT / f"{METHODS[name].script}.py"
    done = launch(*arguments, *numbers_of(name, "primus"), script=script, cwd=tmp_path)
    assert "total" in done.stdout
