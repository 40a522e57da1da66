"""Write what others read while training goes on."""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """One thread, one thing at a time; what goes wrong there is said, and ends nothing.

    Args:
        say: prints for the user.
        what: is done there, in a word, and the key of a recipe that says how often.
    """

    def __init__(self, say: Callable[..., None], what: str, key: str):
        self.say, self.what, self.key, self.thread = say, what, key, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    @property
    def is_done(self) -> bool:
        return self.pending is None or self.pending.done()

    def start(self, act: Callable[[], None], queued: bool = False) -> None:
        """Let the thread call `act`; not if it is still at the one before, unless this one is to be `queued`."""
        if not self.is_done and not queued:
            self.say(f"{self.what:<11} left out: the one before is not done yet; raise {self.key}")
            return
        if self.is_done:
            self.wait()
        self.pending = self.thread.submit(act)

    def wait(self) -> Exception | None:
        """Until nothing is being done; what went wrong with it."""
        pending, self.pending = self.pending, None
        error = pending.exception() if pending else None
        if error:
            self.say(f"{self.what:<11} failed: {error}", file=sys.stderr)
        return error
