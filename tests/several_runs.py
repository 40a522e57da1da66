"""Run scripts several times in one set of processes, which saves the imports: `several_runs.py RUNS.json`.

Each run of the list has `arguments`, and may have `script` (its module, else train_cva), `stop_at` (the last rank gets
SIGTERM in this step) and `poison` (sample numbers whose views become NaN).
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

import training.run
from benchmarks.cpu_ranks import offer_fsdp
from training.schedules import learning_rate

beats, start_heartbeat = [], training.run.start_heartbeat


def watched_heartbeat(group):
    beats.append(start_heartbeat(group))
    return beats[-1]


training.run.start_heartbeat = watched_heartbeat
PartialState.destroy_process_group = lambda self, group=None: None  # the next run has the same ranks


def run(arguments: list[str], script: str = "train_cva", stop_at: int | None = None, poison: list[int] = ()) -> int:
    """One run; returns its exit code."""
    module = importlib.import_module(script)
    make_batch = module.make_batch
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

    training.run.learning_rate = watched_rate
    module.make_batch = poisoned_batch if poison else make_batch
    try:
        module.main(module.parse_arguments(module.__doc__, arguments))
    except SystemExit as end:
        return end.code
    except FloatingPointError as error:
        print(f"FloatingPointError: {error}", flush=True)
        beats[-1]()  # a script would end here; this process may end before the other rank's next beat
        return 2
    finally:
        module.make_batch = make_batch
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, planned in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        counters.clear()
        code = run(**planned)
        if os.environ["RANK"] == "0":
            print(f"run {number} exit {code}, {counters['stats']['unique_graphs']} graphs compiled", flush=True)
    os._exit(0)  # as the scripts do
