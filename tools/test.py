"""Run the tests in the host's environment, after all set-up.

    python tools/test.py [pytest arguments]

Without arguments all tests run, in several processes of pytest-xdist that share the machine's cores; with arguments one
process runs what they name. With `OMP_NUM_THREADS=1` set, `-n 2` divides that, too; without it the threads of two
processes hinder each other: the training tests took 208 s instead of 26.

The environment variable SUBJECT_PATCHES_OFFLINE=1 forbids fetching anything. The browser tests need Chromium and its
driver, the rest needs nothing that the set-up does not bring.
"""

from __future__ import annotations

import os
import sys

from host import ROOT, find_host
from hosting.command import replace_process, run
from hosting.private import ensure_client

# Each has a server of its own, of a gigabyte and a half.
_PROCESSES = 4


def main() -> int:
    """Set up what is not, then become pytest with the arguments of the command line."""
    offline = os.environ.get("SUBJECT_PATCHES_OFFLINE", "") not in ("", "0")
    host = find_host(offline=offline, development=True)
    ensure_client(offline=offline)
    os.chdir(ROOT)
    environment, arguments = host.environment(), sys.argv[1:]
    if not arguments:
        cores = os.cpu_count() or 1
        processes = min(cores, _PROCESSES)
        arguments = ["-n", str(processes), "--dist", "worksteal"]
        # Two processes of one thread are much faster than one process of two.
        environment |= {"OMP_NUM_THREADS": str(cores // processes)}
    replace_process([str(host.python), "-m", "pytest", *arguments], environment)


if __name__ == "__main__":
    run(main)
