"""How the scripts end: one readable line for what the user can mend, a traceback for what only we can."""

import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
LAST_WORDS = 5.0  # seconds that the first rank gets to speak: launchers end it when another has ended
LOADER_DIED = (
    "a loader process ended ({}), perhaps for want of memory: lower run.workers or give the job more, and go on from "
    "the last checkpoint with --resume auto"
)
DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def run(script: str, main: Callable[[], None]) -> None:
    """Run `main` and end the process; an error of this project's own, or a disk's, is one line, with exit code 2.

    The process ends at once, without the interpreter's tidying up: there libraries' threads now and then abort, or wait
    for ranks that wait for this one, and a launcher would take a finished run for a crashed one.
    """
    code = exit_code(script, main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(script: str, main: Callable[[], None]) -> int:
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    except Exception as error:
        try:
            return _say(script, error)
        except RuntimeError as later:  # torch's signal handler tells of a dead loader wherever we are by then
            return _say(script, later)
    return 0


def _say(script: str, error: Exception) -> int:
    """Print an error; the exit code that it is worth."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # one word of a dead loader is enough
    of_a_loader = words_of_a_loader(error)
    if not of_a_loader and not is_for_the_user(error):
        traceback.print_exception(error)
        return 1
    rank = os.environ.get("RANK", "0")
    if rank == "0" or of_a_loader or isinstance(error, OSError):  # other errors are the same on all ranks
        print(f"{Path(script).name}: {of_a_loader or error}", file=sys.stderr)
    else:
        time.sleep(LAST_WORDS)
    return 2


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error is this project's own word, or a disk's; anything else is a bug and shows where it came from."""
    if not isinstance(error, (ValueError, OSError, FloatingPointError)):
        return False
    ours = _is_ours(traceback.extract_tb(error.__traceback__)[-1].filename)
    return ours or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


def words_of_a_loader(error: BaseException) -> str | None:
    """What to say of an error of a loader process that is for the user; torch puts it into a traceback of its own."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker (pid"):
        return LOADER_DIED.format(text.splitlines()[0])
    if any(Path(frame.filename).name == "resource_sharer.py" for frame in traceback.extract_tb(error.__traceback__)):
        return LOADER_DIED.format("a batch that it had ready is gone with it")
    if not (isinstance(error, (ValueError, OSError)) and "in DataLoader worker process" in text):
        return None
    *_, place = re.findall(r'^  File "(.+?)", line', text, re.MULTILINE)
    return text.rstrip().splitlines()[-1].partition(": ")[2] if _is_ours(place) else None


def _is_ours(file: str) -> bool:
    place = Path(file).resolve()
    return place.is_relative_to(HERE) and "site-packages" not in place.parts
