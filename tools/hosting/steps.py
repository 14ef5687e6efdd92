"""Setting a folder up in steps that survive being cut off at any point and being run twice at once."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ToolError
from .lock import exclusive
from .pip import disk_full


@dataclass(frozen=True)
class Step:
    """One step of a set-up.

    `recipe` says everything that decides the outcome: when it changes, the step and those after it run again.
    `run` must be safe to run over what an interrupted run of it left. `gib` is the disk space it needs, in GiB.
    `product` is a path without which the step does not count as done.
    """

    name: str
    recipe: str
    title: str
    run: Callable[[], None]
    gib: float = 0.1
    product: Path | None = None

    def stamp(self, folder: Path) -> Path:
        """The file that says that the step is done."""
        return folder / f"{self.name}.done"

    def done(self, folder: Path) -> bool:
        """Whether the step has been done in `folder` by the present recipe."""
        if self.product is not None and not self.product.exists():
            return False
        try:
            return self.stamp(folder).read_text(encoding="utf-8") == self.recipe
        except OSError:
            return False


def run_steps(folder: Path, steps: Sequence[Step], offline: bool) -> None:
    """Do those of `steps` that are not done in `folder`, in order, one process at a time.

    Raises:
        ToolError: something is left to do and `offline` forbids it, the disk is full, or a step failed.
    """
    if all(step.done(folder) for step in steps):
        return
    if offline:
        raise ToolError(
            f"{folder} is not fully set up, and nothing may be fetched; run the same command once without --offline or "
            "SUBJECT_PATCHES_OFFLINE."
        )
    try:
        with exclusive(folder.with_name(f"{folder.name}.lock")):
            folder.mkdir(parents=True, exist_ok=True)
            _run_missing(folder, steps)
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise disk_full(folder) from error
        raise ToolError(f"The set-up in {folder} failed ({error}); free that path and try again.") from error


def _run_missing(folder: Path, steps: Sequence[Step]) -> None:
    first = next((number for number, step in enumerate(steps) if not step.done(folder)), len(steps))
    for step in steps[first:]:
        step.stamp(folder).unlink(missing_ok=True)
    for number, step in enumerate(steps[first:], start=first + 1):
        if shutil.disk_usage(folder).free < step.gib * 2**30:
            raise ToolError(
                f"The disk that holds {folder} has less than {step.gib:g} GiB free, which the next step of the set-up "
                f"({step.title}) needs; free some space, or set SUBJECT_PATCHES_CACHE to a folder on another disk."
            )
        print(f"[{number}/{len(steps)}] {step.title}", file=sys.stderr, flush=True)
        step.run()
        partial = step.stamp(folder).with_suffix(".partial")
        partial.write_text(step.recipe, encoding="utf-8")
        partial.replace(step.stamp(folder))
