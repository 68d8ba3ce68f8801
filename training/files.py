"""Files that are either whole or not there."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what is written there takes its place when the block ends well.

    A process killed in between leaves the old file as it was. The suffix is kept, for writers that look at it.
    """
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_abandoned(pid: int) -> bool:
    """Whether no other process has this number, so that what it was writing will never be whole."""
    if pid == os.getpid():  # in a container, each is often given the same
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left half-written of a file that `replacing` writes."""
    for leftover in path.parent.glob(".*"):
        found = re.fullmatch(rf"\.{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}", leftover.name)
        if found and is_abandoned(int(found[1])):
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or none."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
