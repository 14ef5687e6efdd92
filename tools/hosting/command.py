"""What every command-line tool here does alike: ending cleanly, and moving into the host's interpreter."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from .errors import ToolError
from .location import Host

_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a bad argument with one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where the options are listed, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}; run it with --help to see what it takes.\n")


def run(main: Callable[[], int]) -> NoReturn:
    """Run a tool's `main` and exit with its code; errors are one sentence, and signals unwind like Ctrl-C."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _unwind)
    try:
        code = main()
        sys.stdout.flush()
    except ToolError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        code = _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; without this the interpreter complains once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _unwind(number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt(number)


def enter(host: Host, script: Path, arguments: Sequence[str]) -> None:
    """Start `script` over in the host's interpreter, unless that is the one running; then it returns."""
    if host.running:
        return
    replace_process([str(host.python), str(script), *arguments], clean(host))


def clean(host: Host) -> dict[str, str]:
    """Environment variables for one of the tools in the host's interpreter."""
    environment = host.environment()
    # A tool finds its modules by its own folder.
    del environment["PYTHONSAFEPATH"], environment["PYTHONPATH"]
    return environment


def replace_process(command: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """Become `command`: signals and the exit code are then its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execve(command[0], list(command), environment)
    # Windows has no exec that keeps the console waiting; Ctrl-C reaches the child by itself there.
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                sys.exit(process.wait())
            except KeyboardInterrupt:
                continue
