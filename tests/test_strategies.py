"""Every strategy and number of ranks gives the same run, and takes up what any other has saved."""

import json
import re

import pytest
import torch
from conftest import ROOT, TINY, config, launch, torchrun, whole_state

from training.metrics import read_metrics

pytestmark = pytest.mark.slow

ALIKE = [*TINY, "model.drop_path_rate=0", "train.warmup_steps=5", "train.steps=24", "run.checkpoint_every=24"]
SHORT = [*TINY, "model.drop_path_rate=0", "train.accumulate=2", "train.steps=2"]  # drop-path is drawn by rank
POISONED = [*TINY, "model.drop_path_rate=0", "train.steps=6", "run.checkpoint_every=3", "run.max_skipped=2"]
BLOCKS = 2 + 2  # of the encoder that TINY has, in student and teacher
ON_ONE = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")
ON_TWO = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RELAY = (  # ranks, strategy, the step at which it is stopped
    (2, "zero2", 5),
    (1, "ddp", 8),
    (1, "zero3", 13),
    (2, "fsdp2", 17),
    (2, "zero3", 20),
    (2, "zero1", None),
)


class Launches:
    """Collects runs, and starts them in few launches; `graphs` has how many each has compiled."""

    def __init__(self, folder, volumes):
        self.folder, self.volumes, self.planned, self.names, self.printed, self.graphs = folder, volumes, [], [], {}, {}

    def plan(self, name, strategy, numbers, *more, **rest):
        prepared = self.folder / f"prepared_{rest.get('script')}"  # once
        arguments = ["--config", config(strategy), "--data", self.volumes, "--prepared", prepared, *more]
        arguments += ["--output", self.folder / name]
        self.names.append(name)
        self.planned.append({"arguments": [str(argument) for argument in (*arguments, *numbers)], **rest})

    def start(self, name, ranks):
        (self.folder / "runs.json").write_text(json.dumps(self.planned))
        script = ROOT / "tests" / "several_runs.py"
        done = launch(self.folder / "runs.json", script=script, launcher=torchrun(ranks))
        self.printed[name] = done.stdout + done.stderr
        counts = re.findall(r"^run \d+ exit \d+, (\d+) graphs compiled$", done.stdout, re.MULTILINE)
        self.graphs |= dict(zip(self.names, map(int, counts), strict=True))
        self.planned, self.names = [], []


@pytest.fixture(scope="module")
def runs(tmp_path_factory, volumes):
    launches = Launches(tmp_path_factory.mktemp("strategies"), volumes)

    def relay(first, last):
        for number in range(first, last):
            _, strategy, stop_at = RELAY[number]
            more = ["--resume", "auto"] if number else []
            launches.plan("relay", strategy, ALIKE, *more, stop_at=stop_at)

    for strategy in ON_TWO:
        launches.plan(f"{strategy}_x2", strategy, ALIKE)
        launches.plan(f"{strategy}_short", strategy, SHORT)
        if strategy != "zero1":
            launches.plan(f"{strategy}_poisoned", strategy, POISONED, poison=[9])
    launches.plan("ddp_pulls", "ddp", SHORT, "run.log_gradients=true")
    launches.plan("zero2_pulls", "zero2", SHORT, "run.log_gradients=true")
    for strategy in ("ddp", "fsdp2"):
        launches.plan(f"{strategy}_bf16", strategy, [*ALIKE, "train.precision=bf16"])
    for strategy in ("zero2", "fsdp2", "zero3"):
        launches.plan(f"{strategy}_compiled", strategy, SHORT, "run.compile=true")
    launches.plan("zero2_diverged", "zero2", POISONED, poison=list(range(16, 40)))
    relay(0, 1)
    launches.start("two", 2)
    for strategy in ON_ONE:
        launches.plan(f"{strategy}_x1", strategy, ALIKE)
    relay(1, 3)
    launches.start("one", 1)
    relay(3, len(RELAY))
    launches.start("relay", 2)
    return launches


KEYS = ("loss", "reconstruction", "consistency", "contrastive", "grad_norm")


def curve(output, keys=KEYS):
    return torch.tensor([[record[key] for key in keys] for record in read_metrics(output / "metrics.jsonl")])


def assert_same_run(output, reference, last):
    """Losses and gradient norms of each step, and all weights at the end, to 1e-4.

    Left out are the biases that a normalisation or softmax takes out again: their gradient is rounding alone, which
    Adam blows up to steps of full length. Moments are means of the last gradients, and differ as those do.
    """
    torch.testing.assert_close(curve(output), curve(reference), rtol=1e-4, atol=0)
    state, expected = (whole_state(folder / "checkpoints" / f"step_{last}") for folder in (output, reference))
    strength = {name[11:]: v.mean().sqrt() for name, v in expected.items() if name.startswith("exp_avg_sq.")}
    without_effect = {name for name, value in strength.items() if value < 1e-6 * max(strength.values())}
    assert 0 < len(without_effect) < 8
    ends = tuple(name.removeprefix("student.") for name in without_effect)
    bounds = {"model.student.": 1e-4, "model.teacher.": 1e-4, "model.p": 1e-4, "exp_avg.": 1e-3, "exp_avg_sq.": 1e-3}
    for part, bound in bounds.items():
        names = [name for name in expected if name.startswith(part) and not name.endswith(ends)]
        assert names
        found, wanted = (torch.cat([s[name] for name in names]) for s in (state, expected))
        assert (found - wanted).norm() < bound * wanted.norm(), part


@pytest.mark.parametrize("name", [f"{s}_x1" for s in ON_ONE[1:]] + [f"{s}_x2" for s in ON_TWO])
def test_one_curve(runs, name):
    assert len(curve(runs.folder / name)) == 24
    assert_same_run(runs.folder / name, runs.folder / "ddp_x1", 24)


def test_a_run_handed_from_strategy_to_strategy_is_the_same_run(runs):
    assert_same_run(runs.folder / "relay", runs.folder / "ddp_x1", 24)
    printed = "".join(runs.printed.values())
    assert printed.count("as asked; go on from there with --resume auto") == len(RELAY) - 1
    assert printed.count("exit 75") == len(RELAY) - 1
    assert "of DeepSpeed ZeRO-2, 2 ranks on cpu, taken up by DDP, 1 rank on cpu" in runs.printed["one"]
    assert "of DeepSpeed ZeRO-3, 1 rank on cpu, taken up by FSDP2, 2 ranks on cpu" in runs.printed["relay"]


@pytest.mark.parametrize("strategy", ON_TWO[1:])
def test_micro_batches_and_published_weights_agree(runs, strategy):
    torch.testing.assert_close(
        curve(runs.folder / f"{strategy}_short"), curve(runs.folder / "ddp_short"), rtol=2e-5, atol=1e-6
    )
    weights, expected = (whole_state(runs.folder / f"{s}_short" / "checkpoints" / "step_2") for s in (strategy, "ddp"))
    assert weights.keys() == expected.keys()


@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_compiled_blocks_give_the_same_losses(runs, strategy):
    found, expected = (curve(runs.folder / f"{strategy}_{kind}") for kind in ("compiled", "short"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert runs.graphs[f"{strategy}_compiled"] >= BLOCKS
    assert runs.graphs[f"{strategy}_short"] == 0


def test_what_cannot_be_compiled_is_said(runs):
    assert runs.printed["two"].count("run.compile is ignored: under ZeRO-3") == 2  # once a rank
    assert runs.graphs["zero3_compiled"] == 0
    assert torch.equal(curve(runs.folder / "zero3_compiled"), curve(runs.folder / "zero3_short"))


def test_pulls_of_the_terms_agree(runs):
    keys = ("gradient_of_reconstruction", "gradient_of_consistency", "gradient_of_contrastive")
    pulls = [curve(runs.folder / f"{strategy}_pulls", keys) for strategy in ("zero2", "ddp")]
    torch.testing.assert_close(*pulls, rtol=1e-4, atol=0)


# ------------------------------------------------------------------ bfloat16


def test_blocks_gathered_in_bfloat16_follow_plain_data_parallel(runs):
    """Autocast rounds what it multiplies; FSDP2 here also norms and LayerScale of a block."""
    found, expected, exact = (curve(runs.folder / name, ["loss"]) for name in ("fsdp2_bf16", "ddp_bf16", "ddp_x2"))
    off = (found / expected - 1).abs()
    assert 0 < off.mean() < 0.01
    assert off.max() < 0.03
    assert (found / exact - 1).abs().mean() < 0.01


PRECISIONS = """
import json, sys
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.module import register_module_forward_hook
import train_cva
from benchmarks.cpu_ranks import offer_fsdp
from training.launch import parse_arguments

seen = {}

def note(module, *_):
    seen[module] = {name: str(value.dtype) for name, value in module.named_parameters(recurse=False)}

def tell(run, recipe, step):  # a block itself has given its weights back when its hook is called
    whole = {name: module for name, module in run.model.named_modules() if not isinstance(module, FSDPModule)}
    print("seen", json.dumps({name: seen[module] for name, module in whole.items() if seen.get(module)}))

offer_fsdp()
register_module_forward_hook(note)
train_cva.main(parse_arguments("", sys.argv[1:]), tell)
"""


def test_only_blocks_are_gathered_in_bfloat16(tmp_path, volumes):
    (tmp_path / "precisions.py").write_text(PRECISIONS)
    numbers = [*TINY, "train.steps=2", "train.precision=bf16", "run.checkpoint_every=1"]
    arguments = ["--config", config("fsdp2"), "--data", volumes, "--output", tmp_path / "run", *numbers]
    done = launch(*arguments, script=tmp_path / "precisions.py", launcher=torchrun(1))
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("seen ")).removeprefix("seen "))
    for part in ("student.features.encoder", "student.features.feature_decoder", "student.decoder", "teacher.features"):
        assert any(name.startswith(part) and ".blocks." in name for name in seen), part
    assert any(name.startswith("projector.") for name in seen)
    for name, parameters in seen.items():
        assert set(parameters.values()) == {"torch.bfloat16" if ".blocks." in name else "torch.float32"}, name


# ------------------------------------------------------------------ steps that are not finite


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_step_that_is_not_finite_is_skipped_and_its_sample_named(runs, strategy):
    output = runs.folder / f"{strategy}_poisoned"
    records = read_metrics(output / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert ["loss" in record for record in records] == [True, True, False, True, True, True]  # sample 9 is in step 3
    assert [record["skipped"] for record in records] == [0, 0, 0, 1, 1, 1]
    skipped = (
        "skipped     step 3: loss or gradient is not finite; the encoder's features are not finite for samples [9]"
    )
    assert skipped in runs.printed["two"]
    meta = json.loads((output / "checkpoints" / "step_6" / "meta.json").read_text())
    assert meta["skipped"] == [1, 0]
    assert meta["updates"] == 5
    assert json.loads((output / "checkpoints" / "step_3" / "meta.json").read_text())["updates"] == 2
    state, of_ddp = (
        whole_state(folder / "checkpoints" / "step_6") for folder in (output, runs.folder / "ddp_poisoned")
    )
    for name in (
        "model.teacher.features.encoder.patch_embed.weight",
        "exp_avg_sq.student.features.encoder.patch_embed.weight",
    ):
        torch.testing.assert_close(state[name], of_ddp[name], rtol=1e-4, atol=1e-7)


def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(runs):
    output = runs.folder / "zero2_diverged"
    found = re.search(r"FloatingPointError: 2 steps in a row .*the last one step 6: (.*);", runs.printed["two"])
    assert found
    assert f"the last good checkpoint is {output / 'checkpoints' / 'step_3'}" in found[0]
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step_3"]
