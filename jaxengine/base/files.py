"""Small text files that are written whole or not at all, and a lock that one process holds."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` under another name and rename: a process that dies leaves what was there before."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Inside, nobody else holds the file at `path`, which has this process's id in it.

    The kernel lets go of it where the process dies, so no crash leaves a lock behind. The file stays, because another
    process may have it open. Raises BlockingIOError, naming the folder and the process, where somebody else holds it.
    """
    import fcntl  # not everywhere, and who only writes files needs none

    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"process {file.read().strip() or 'unknown'}"
            raise BlockingIOError(
                f"{path.parent} is in use by {holder} (this is {os.getpid()}): wait until it ends, or give another "
                "folder"
            ) from None
        try:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child has the file too
