"""Run train_cva.py several times in one set of processes, which saves the imports: `several_runs.py RUNS.json`.

Each run of the list has `arguments`, and may have `stop_at` (the last rank gets SIGTERM in this step) and `poison`
(sample numbers whose views become NaN).
"""

import json
import os
import signal
import sys
from pathlib import Path

import deepspeed
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState

import train_cva

make_batch, learning_rate = train_cva.make_batch, train_cva.learning_rate
PartialState.destroy_process_group = lambda self, group=None: None  # the next run has the same ranks


def fsdp_on_cpu() -> None:
    """Accelerate offers FSDP to GPUs only; these lines let a test have it on a CPU."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def run(arguments: list[str], stop_at: int | None, poisoned: list[int]) -> int:
    """One run; returns its exit code."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    deepspeed.comm.comm.cdb = None
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if any(Path(argument).stem.startswith("fsdp") for argument in arguments):
        fsdp_on_cpu()

    def watched_rate(step, *numbers):
        if step + 1 == stop_at and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return learning_rate(step, *numbers)

    def poisoned_batch(samples, *rest):
        batch = make_batch(samples, *rest)
        bad = torch.isin(samples["pair"], torch.tensor(poisoned, dtype=torch.long))
        return batch | {"views": torch.where(bad[:, None, None, None, None], torch.nan, batch["views"])}

    train_cva.learning_rate = watched_rate
    train_cva.make_batch = poisoned_batch if poisoned else make_batch
    try:
        train_cva.main(train_cva.parse_arguments(arguments))
    except SystemExit as end:
        return end.code
    except FloatingPointError as error:
        print(f"FloatingPointError: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, planned in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        code = run(planned["arguments"], planned.get("stop_at"), planned.get("poison", []))
        if os.environ["RANK"] == "0":
            print(f"run {number} exit {code}", flush=True)
    os._exit(0)  # as train_cva.py does
