"""Notice a rank that has died: a GPU's collective would wait for it for ten minutes, and show nothing."""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

EVERY = 5.0  # seconds between beats
LIMIT = timedelta(seconds=40)  # for a machine that went without closing its connections
LAST_WORDS = 5.0  # seconds that this rank gets to show an error of its own


def start_heartbeat() -> Callable[[], None]:
    """Beat together in a thread, over connections of its own; if a rank stays away, end this process with exit code 1.

    Returns:
        To be called at the end: waits until all ranks have called it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return lambda: None
    group, over = dist.new_group(backend="gloo", timeout=LIMIT), threading.Event()

    def beat() -> None:
        finished = torch.zeros(1)
        while finished < dist.get_world_size():
            over.wait(EVERY)
            finished.fill_(over.is_set())
            try:
                dist.all_reduce(finished, group=group)
            except RuntimeError as error:
                time.sleep(LAST_WORDS)
                print(f"rank {os.environ.get('RANK')}: another rank is gone, ending ({error})", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end
