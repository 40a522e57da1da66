"""How the scripts end: one readable line for what the user can mend, a traceback for what only we can."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)


def run(script: str, main: Callable[[], None]) -> None:
    """Run `main`; an error of this project's own, or a disk's, is printed as one line, with exit code 2.

    Any other error is shown whole and ends the process at once: tidying up may wait for ranks that wait for this one.
    """
    try:
        main()
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, FloatingPointError)) or not is_for_the_user(error):
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        rank = os.environ.get("RANK", "0")
        if rank == "0" or isinstance(error, OSError):  # other errors are the same on all ranks
            print(f"{Path(script).name}: {error}", file=sys.stderr)
        sys.exit(2)


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error is this project's own word, or a disk's; anything else is a bug and shows where it came from."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    ours = place.is_relative_to(HERE) and "site-packages" not in place.parts
    return ours or (isinstance(error, OSError) and error.errno in DISK_ERRORS)
