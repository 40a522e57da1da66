"""Run scripts several times in one set of processes, which saves the imports: `several_runs.py RUNS.json`.

Each run of the list has `arguments`, and may have `script` (its module, else train_cva), `stop_at` (the last rank gets
SIGTERM in this step), `poison` (sample numbers whose views become NaN) and `draws` (else it leaves no pictures, which
take longer than its steps). The cost of a step is counted once for all runs with the same numbers.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from torch._dynamo.utils import counters

import training.export
import training.run
from benchmarks.cpu_ranks import offer_fsdp
from training.schedules import learning_rate

beats, start_heartbeat = [], training.run.start_heartbeat
draw_report, costs = training.export.draw_report, {}


def watched_heartbeat(group):
    beats.append(start_heartbeat(group))
    return beats[-1]


training.run.start_heartbeat = watched_heartbeat
PartialState.destroy_process_group = lambda self, group=None: None  # the next run has the same ranks


def run(
    arguments: list[str],
    script: str = "train_cva",
    stop_at: int | None = None,
    poison: list[int] = (),
    draws: bool = False,
) -> int:
    """One run; returns its exit code."""
    module = importlib.import_module(script)
    make_batch, step_cost = module.make_batch, module.step_cost
    asked = module.parse_arguments(module.__doc__, arguments)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    deepspeed.comm.comm.cdb = None
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if any(Path(argument).stem.startswith("fsdp") for argument in arguments):
        offer_fsdp()

    def watched_rate(step, *numbers):
        if step + 1 == stop_at and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, *numbers)

    def poisoned_batch(samples, *rest, **named):
        batch = make_batch(samples, *rest, **named)
        bad = torch.isin(samples["pair"], torch.tensor(poison, dtype=torch.long))
        return batch | {"views": torch.where(bad[:, None, None, None, None], torch.nan, batch["views"])}

    def known_cost(*of):
        numbers = script, asked.recipe, *asked.overrides
        if numbers not in costs:
            costs[numbers] = step_cost(*of)
        return costs[numbers]

    training.run.learning_rate = watched_rate
    training.export.draw_report = draw_report if draws else lambda *_: None
    module.step_cost = known_cost
    module.make_batch = poisoned_batch if poison else make_batch
    try:
        module.main(asked)
    except SystemExit as end:
        return end.code
    except FloatingPointError as error:
        print(f"FloatingPointError: {error}", flush=True)
        beats[-1]()  # a script would end here; this process may end before the other rank's next beat
        return 2
    finally:
        module.make_batch, module.step_cost = make_batch, step_cost
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, planned in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        counters.clear()
        code = run(**planned)
        if os.environ["RANK"] == "0":
            print(f"run {number} exit {code}, {counters['stats']['unique_graphs']} graphs compiled", flush=True)
    os._exit(0)  # as the scripts do
