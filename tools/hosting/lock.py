"""A lock between processes that the operating system lets go of when its holder dies."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import ToolError

_POLL_SECONDS = 0.5


@contextlib.contextmanager
def held_alone(path: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `path` for the time of a `with` block. Raises ToolError with `refusal` where another process
    holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if not _try_lock(file):
            raise ToolError(refusal)
        try:
            yield
        finally:
            _unlock(file)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path` for the time of a `with` block, waiting for whoever holds it now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        told = False
        while not _try_lock(file):
            if not told:
                print("Another set-up is under way; waiting for it to end.", file=sys.stderr, flush=True)
                told = True
            time.sleep(_POLL_SECONDS)
        # Passed on to the processes that a set-up starts; see run_to_end.
        os.set_inheritable(file.fileno(), True)
        try:
            yield
        finally:
            _unlock(file)


if os.name == "nt":
    import msvcrt

    def _try_lock(file: IO[bytes]) -> bool:
        file.seek(0)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: IO[bytes]) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
