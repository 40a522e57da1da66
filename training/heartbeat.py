"""Notice a rank that has died: a GPU's collective would wait for it for ten minutes, and show nothing."""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch.distributed as dist

EVERY = 5.0  # seconds between beats
LIMIT = 40.0  # seconds that a rank may stay away; all do who has died
POLL = 0.5  # seconds between two looks whether all have beaten
LAST_WORDS = 5.0  # seconds that this rank gets to show an error of its own


def start_heartbeat(group: dist.ProcessGroup) -> Callable[[], None]:
    """Count beats together in a thread; if a rank stays away, end this process with exit code 1.

    The counts are in a store of the first rank, one connection a rank: any two ranks connected for it, as a gloo group
    has them, would be 511 descriptors each for 512 ranks.

    Args:
        group: to tell the others where the store is.

    Returns:
        To be called at the end: waits until all ranks have called it.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return lambda: None
    store, over = _store_of_first_rank(group), threading.Event()

    def arrived(number: int) -> bool:
        """Beat, and wait for the others; False once all are over."""
        store.set(f"beat {rank}", str(number))
        store.add("beats", 1)
        until = time.monotonic() + LIMIT
        while store.add("over", 0) < ranks:
            if store.add("beats", 0) >= number * ranks:
                return True
            if time.monotonic() > until:
                late = [other for other in range(ranks) if _beats(store, other) < number]
                _end(f"no sign of rank {', '.join(map(str, late))} for {LIMIT:.0f} s")
            time.sleep(POLL)
        return False

    def beat() -> None:
        number, goes_on, told = 0, True, False
        try:
            while goes_on:
                if over.wait(EVERY) and not told:
                    told = bool(store.add("over", 1))
                number += 1
                # a machine that vanishes closes no connection, and the store would wait for ever
                silent = threading.Timer(LIMIT + EVERY, _end, ["the machine of rank 0 does not answer"])
                silent.daemon = True
                silent.start()
                goes_on = arrived(number)
                silent.cancel()
            store.add("left", 1)
            until = time.monotonic() + LIMIT
            while rank == 0 and store.add("left", 0) < ranks and time.monotonic() < until:
                time.sleep(POLL)  # the store goes with this process
        except RuntimeError as error:
            _end(f"rank 0 is gone ({str(error).splitlines()[0][:120]})")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()

    def end() -> None:
        over.set()
        thread.join()

    return end


def _store_of_first_rank(group: dist.ProcessGroup) -> dist.Store:
    connect = partial(
        dist.TCPStore, os.environ["MASTER_ADDR"], wait_for_workers=False, timeout=timedelta(seconds=LIMIT)
    )
    store = connect(0, is_master=True) if dist.get_rank() == 0 else None
    port = [store.port if store else None]
    dist.broadcast_object_list(port, group=group)
    return store or connect(port[0], is_master=False)


def _beats(store: dist.Store, rank: int) -> int:
    key = f"beat {rank}"
    return int(store.get(key)) if store.check([key]) else 0


def _end(why: str) -> None:
    time.sleep(LAST_WORDS)
    print(f"rank {dist.get_rank()}: another rank is gone, ending ({why})", file=sys.stderr, flush=True)
    os._exit(1)
