"""Files that outlive a loss of power."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def has_no_locks(error: Exception) -> bool:
    """Whether the error of a lock says that the file system, or the operating system, has none."""
    return isinstance(error, NotImplementedError) or (isinstance(error, OSError) and error.errno in NO_LOCKS)


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise  # some network file systems do not flush folders
    finally:
        os.close(descriptor)


def write_whole(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file beside this one, then put it in this one's place: whole, or not at all.

    Several processes may write the same file at once: one of them wins.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        fill(temporary)
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
