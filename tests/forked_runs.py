"""Runs of scripts that are forked from a process which has imported the libraries: seconds less for each of them.

A run does what `python SCRIPT ARGUMENTS` does, in a process of its own: it imports this project's modules, and draws
other random numbers than the one before. Who needs other variables of the environment, which a library may read when it
is imported, starts a process as a user does.
"""

import atexit
import ctypes
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

LIBRARIES = (  # what a run imports anyway, the longest of it
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "transformers.modeling_utils",
    "transformers.image_processing_base",
    "accelerate",
    "deepspeed",
    "deepspeed.ops.adam",
    "joblib",
    "matplotlib.pyplot",
    "nibabel",
    "pandas",
    "pyarrow.parquet",
    "pydantic",
    "scipy.ndimage",
)
READ_AT_IMPORT = ("GOMP_", "HF_", "MPL", "OMP_", "PYTHON")  # variables that the imported libraries will not read again
PATIENCE = 30.0  # seconds for a rank to end when another has failed
PR_SET_PDEATHSIG = 1


class Forks:
    """Asks such a process for runs; it is started by the first one, and ends with this process."""

    def __init__(self):
        self.process, self.environment = None, None

    def fit(self, environment: dict[str, str]) -> bool:
        """Whether the libraries were, or will be, imported with these variables."""
        return self.environment in (None, _read(environment))

    def run(self, command: list[str], cwd: Path, ranks: list[dict[str, str]]) -> subprocess.CompletedProcess:
        """With the first exit code that is not 0, and all that the ranks wrote.

        Args:
            ranks: the environment of each.
        """
        if self.process is None:
            self.environment = _read(os.environ)
            command_line = [sys.executable, __file__]
            self.process = subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            atexit.register(self.process.kill)
        with TemporaryDirectory() as folder:
            request = {"command": command, "cwd": str(cwd), "ranks": ranks, "folder": folder}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            written = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess(command, code, *written)


def _read(environment: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key.startswith(READ_AT_IMPORT)}


# ------------------------------------------------------------------ the process that has imported the libraries


def serve() -> None:
    sys.path[0] = ""  # the tests' folder is for those who ask for it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for name in LIBRARIES:
        __import__(name)
    for line in sys.stdin:
        request = json.loads(line)
        started = [_start(request, rank) for rank in request["ranks"]]
        print(_wait(started), file=answers, flush=True)


def _start(request: dict, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        code = _run(request["command"], request["cwd"], environment)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(command: list[str], cwd: str, environment: dict[str, str]) -> int:
    import numpy as np
    import torch

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    random.seed(), np.random.seed(), torch.seed()
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path(command[0]).parent), *filter(None, path)]
    sys.stdout = os.fdopen(1, "w")
    runpy.run_path(command[0], run_name="__main__")
    return 0


def _wait(ranks: list[int]) -> int:
    """The first exit code that is not 0; as launchers do, those that go on when one has failed are ended."""
    running, failed, deadline = set(ranks), 0, float("inf")
    while running:
        for rank in tuple(running):
            ended, status = os.waitpid(rank, os.WNOHANG)
            if not ended:
                continue
            running.remove(rank)
            if status and not failed:
                failed, deadline = os.waitstatus_to_exitcode(status), time.monotonic() + PATIENCE
                for other in running:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > deadline:
            for rank in running:
                os.kill(rank, signal.SIGKILL)
        time.sleep(0.005)
    return failed


if __name__ == "__main__":
    serve()
