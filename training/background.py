"""Write what others read while training goes on."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One thread, one thing at a time; what goes wrong there is said, and ends nothing.

    Args:
        say: prints for the user.
    """

    def __init__(self, say: Callable[..., None]):
        self.say, self.thread = say, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Let the thread call `write`; not if it is still at the one before, which is not waited for."""
        if self.pending and not self.pending.done():
            self.say("export      left out: the one before is still being written; raise run.export_every")
            return
        self.wait()
        self.pending = self.thread.submit(write)

    def wait(self) -> Exception | None:
        """Until nothing is being written; what went wrong with it."""
        pending, self.pending = self.pending, None
        error = pending.exception() if pending else None
        if error:
            self.say(f"export      failed: {error}", file=sys.stderr)
        return error
