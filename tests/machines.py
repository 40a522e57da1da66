"""Commands on machines that are this one: each with a log, waited for, killed at the end."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from conftest import BIN, ROOT

CLUSTER = ROOT / "cluster"
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")},
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "CUDA_VISIBLE_DEVICES": "",
    "PET_LOCAL_ADDR": "127.0.0.1",
    "LOKY_MAX_CPU_COUNT": "1",  # each machine would take all cores for its threads
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher and all that it started, which is in process groups of its own: a machine that is gone."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    process.kill()
    for child in started:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


class Machines:
    """Starts commands, each with a log; what still runs at the end is killed."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []

    def start(self, *command, name: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
        with open(self.folder / f"{name}.log", "a") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env=ENVIRONMENT | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def wait(self, condition: Callable[[], bool], *alive: subprocess.Popen, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            assert all(process.poll() is None for process in alive), self.logs()
            time.sleep(0.02)

    def wait_for_the_end(self, *processes: subprocess.Popen) -> None:
        self.wait(lambda: all(process.poll() is not None for process in processes))
        assert all(process.returncode == 0 for process in processes), self.logs()

    def kill(self) -> None:
        for process in self.started:
            if process.poll() is None:
                kill(process)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-5000:]}" for path in sorted(self.folder.glob("*.log")))
