"""Kill a training on two CPU ranks again and again, and compare what it ends with to an undisturbed one.

    python benchmarks/chaos.py --kills 25
    python benchmarks/chaos.py --kills 4 --strategies ddp zero3 --seed 7

At random moments ranks get SIGKILL (one or all, also while a checkpoint is being written), SIGTERM or SIGUSR1 (one),
and now and then a file of the newest checkpoint is damaged. After each the same command is given again. Prints one
table, and ends with 1 unless everything is bit-identical: weights, teacher, moments, random states, exported weights,
and each number in metrics.jsonl but times. Processes are forked from one that has imported everything; how long the
imports take is printed too.
"""

import argparse
import ctypes
import faulthandler
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel as nib
import numpy as np
import torch

import train_cva
import training.export
from benchmarks.cpu_ranks import offer_fsdp
from training.checkpoints import MARKER, complete_checkpoints
from training.command_line import run
from training.guards import STOPPED
from training.launch import parse_arguments
from training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
INTERVAL, STEPS = 7, 42
PATIENCE = 10  # seconds for a rank to end by itself when the other is gone
RECIPE = [
    "views.crop_size=[32,32,32]",
    "views.cells=[3,3,3]",
    "data.spacing=[1,1,1]",
    "mask.block=8",
    "model={architecture: primus, hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 2, patch_size: 8, "
    "drop_path_rate: 0.2, decoder_layers: 1, feature_decoder_heads: 2}",
    "heads={projector_size: 32, predictor_size: 16}",
    f"train.steps={STEPS}",
    "train.batch_size=4",
    "train.warmup_steps=5",
    "run.log_every=2",
    f"run.checkpoint_every={INTERVAL}",
    "run.checkpoint_in_background=true",
]
TIMES = {"seconds", "volumes_per_second", "data_wait", "tflops"}


def launch(strategy: str, volumes: Path, output: Path) -> list[int]:
    """Start two ranks that go on with a run; their process numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        child = os.fork()
        if child:
            ranks.append(child)
            continue
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        faulthandler.register(signal.SIGUSR2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
        if strategy == "fsdp2":
            offer_fsdp()
        training.export.draw_report = lambda *_: None
        command = ["--config", ROOT / "ds_configs" / f"{strategy}.json", "--data", volumes, "--output", output]
        command += ["--prepared", volumes.parent / "prepared", "--resume", "auto", *RECIPE]
        arguments = parse_arguments(train_cva.__doc__, [str(part) for part in command])
        run("train_cva.py", partial(train_cva.main, arguments))
    return ranks


def exit_codes(ranks: list[int], seconds: float) -> list[int | None]:
    """Of the ranks that end within so many seconds."""
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(ranks) and time.monotonic() < until:
        for rank in ranks:
            if rank not in codes and (found := os.waitpid(rank, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.005)
    return [codes.get(rank) for rank in ranks]


def steps_logged(output: Path) -> int:
    return max((record["step"] for record in read_metrics(output / "metrics.jsonl")), default=0)


def newest_step(output: Path) -> int:
    complete = complete_checkpoints(output / "checkpoints")
    return int(complete[-1].name[5:]) if complete else 0


def alive(ranks: list[int]) -> bool:
    return all(os.waitid(os.P_PID, rank, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for rank in ranks)


def wait_for_moment(kind: str, ranks: list[int], output: Path, dice: random.Random) -> float | None:
    """Until the moment to strike; the seconds from the start to the first new step, if that came."""
    started, before, resumed = time.monotonic(), steps_logged(output), None
    if dice.random() < 0.15:  # while it starts
        time.sleep(dice.uniform(0, 3))
        return None
    until, written = dice.randint(2, 2 * INTERVAL), newest_step(output)
    while alive(ranks):
        logged = steps_logged(output)
        if resumed is None and logged != before and logged > newest_step(output):
            resumed = time.monotonic() - started
        if kind == "while writing":
            if newest_step(output) > written or list((output / "checkpoints").glob("tmp-step_*")):
                time.sleep(dice.uniform(0, 0.01))
                break
        elif resumed and logged >= written + until:
            time.sleep(dice.uniform(0, 0.3))
            break
        time.sleep(0.001)
    return resumed


def strike(kind: str, ranks: list[int], dice: random.Random) -> None:
    number = {"SIGTERM": signal.SIGTERM, "SIGUSR1": signal.SIGUSR1}.get(kind, signal.SIGKILL)
    hit = ranks if dice.random() < 0.4 and number == signal.SIGKILL else [dice.choice(ranks)]
    for rank in hit:
        os.kill(rank, number)


def damage(output: Path, dice: random.Random) -> bool:
    """Harm a file of the newest checkpoint, if there is one before it."""
    complete = complete_checkpoints(output / "checkpoints")
    if len(complete) < 2:
        return False
    path = dice.choice(sorted(complete[-1].iterdir()))
    data = bytearray(path.read_bytes())
    how = dice.choice(["flip", "cut", "empty"])
    if how == "flip":
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data if how == "flip" else data[: len(data) // 2 if how == "cut" else 0])
    return True


def differences(output: Path, reference: Path) -> list[str]:
    """What a finished run has otherwise than an undisturbed one."""
    found = []
    sums = [
        [line for line in (run / "checkpoints" / f"step_{STEPS}" / MARKER).read_text().splitlines() if "state" in line]
        for run in (output, reference)
    ]
    if sums[0] != sums[1]:
        found.append("checkpoint")
    for name in ("encoder/model.safetensors", "pretraining.safetensors"):
        if (output / name).read_bytes() != (reference / name).read_bytes():
            found.append(name)
    records = [
        [
            {key: value for key, value in record.items() if key not in TIMES}
            for record in read_metrics(run / "metrics.jsonl")
        ]
        for run in (output, reference)
    ]
    if records[0] != records[1]:
        found.append("metrics.jsonl")
    return found


def torment(strategy: str, kills: int, folder: Path, seed: int) -> dict[str, object]:
    dice = random.Random(f"{strategy} {seed}")
    reference, volumes = folder / f"{strategy}_reference", folder / "volumes"
    assert exit_codes(launch(strategy, volumes, reference), 600) == [0, 0], reference.with_suffix(".log").read_text()
    counts = dict.fromkeys(("SIGKILL", "while writing", "SIGTERM", "SIGUSR1", "damaged"), 0)
    lost, resumes, ends, wrong, runs = [], [], [], [], 0
    output = folder / f"{strategy}_0"
    finished = False
    while not finished or sum(counts.values()) - counts["damaged"] < kills:
        if finished:
            runs += 1
            output, finished = folder / f"{strategy}_{runs}", False
        ranks = launch(strategy, volumes, output)
        enough = sum(counts.values()) - counts["damaged"] >= kills
        kind = dice.choice(["SIGKILL", "SIGKILL", "while writing", "while writing", "SIGTERM", "SIGUSR1"])
        resumed = None if enough else wait_for_moment(kind, ranks, output, dice)
        resumes += [resumed] if resumed else []
        if enough or not alive(ranks):
            codes = exit_codes(ranks, 600)
            finished = codes == [0, 0]
            if not finished:
                wrong.append(f"{output} ended with {codes} by itself")
                break
            wrong += [f"{output}: {what}" for what in differences(output, reference)]
            continue
        strike(kind, ranks, dice)
        struck, logged = time.monotonic(), steps_logged(output)
        codes = exit_codes(ranks, PATIENCE)
        if None in codes:  # a rank that waits for the others to be there at all is stopped by its launcher
            waiting = [rank for rank, code in zip(ranks, codes) if code is None]
            for rank in waiting:
                os.kill(rank, signal.SIGTERM)
            late = dict(zip(waiting, exit_codes(waiting, 60 - PATIENCE)))
            codes = [late.get(rank, code) for rank, code in zip(ranks, codes)]
        ends.append(time.monotonic() - struck)
        counts[kind] += 1
        if None in codes:
            wrong.append(f"{output}: a rank outlived the other for a minute after {kind}")
            hanging = [rank for rank, code in zip(ranks, codes) if code is None]
            for number in (signal.SIGUSR2, signal.SIGKILL):  # the stacks, for the log
                for rank in hanging:
                    os.kill(rank, number)
                time.sleep(1)
            exit_codes(hanging, 60)
        harmed = dice.random() < 0.15 and damage(output, dice)
        counts["damaged"] += harmed
        if not harmed:
            lost.append(max(0, logged - newest_step(output)))
            if codes == [STOPPED, STOPPED] and lost[-1]:
                wrong.append(f"{output}: lost {lost[-1]} steps although it stopped in order")
    return {
        "strategy": strategy,
        **counts,
        "runs": runs + 1,
        "steps lost, most / mean": f"{max(lost)} / {statistics.mean(lost):.1f} (interval {INTERVAL})",
        "to resume, median": f"{statistics.median(resumes):.1f} s" if resumes else "-",
        "others ended within": f"{max(ends):.1f} s",
        "different": len(wrong),
        "wrong": wrong,
    }


def make_volumes(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        volume = rng.normal(size=(10, 11, 9)).repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / f"{number}.nii")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of each strategy")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="do the runs here and leave them, with their logs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # forking from a process with running threads would hang
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import train_cva"], cwd=ROOT, check=True)
    print(f"imports: {time.monotonic() - started:.1f} s, not in the times below")
    folder = arguments.keep or Path(tempfile.mkdtemp())
    make_volumes(folder / "volumes")
    rows = []
    for strategy in arguments.strategies:
        rows.append(torment(strategy, arguments.kills, folder, arguments.seed))
        columns = [key for key in rows[0] if key != "wrong"]
        if len(rows) == 1:
            print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        print("| " + " | ".join(str(rows[-1][key]) for key in columns) + " |", flush=True)
    wrong = [what for row in rows for what in row["wrong"]]
    print("\n".join(wrong) or f"{sum(r[k] for r in rows for k in ('SIGKILL', 'while writing', 'SIGTERM', 'SIGUSR1'))} "
          "kills survived, nothing differs")  # fmt: skip
    if not arguments.keep and not wrong:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
