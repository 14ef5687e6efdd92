"""Run the tests in the host's environment, after all set-up.

    python tools/test.py [pytest arguments]

The environment variable SUBJECT_PATCHES_OFFLINE=1 forbids fetching anything. The browser tests need Chromium and its
driver, the rest needs nothing that the set-up does not bring.
"""

from __future__ import annotations

import os
import sys

from host import ROOT, find_host
from hosting.command import replace_process, run
from hosting.private import ensure_client


def main() -> int:
    """Set up what is not, then become pytest with the arguments of the command line."""
    offline = os.environ.get("SUBJECT_PATCHES_OFFLINE", "") not in ("", "0")
    host = find_host(offline=offline, development=True)
    ensure_client(offline=offline)
    os.chdir(ROOT)
    replace_process([str(host.python), "-m", "pytest", *sys.argv[1:]], host.environment())


if __name__ == "__main__":
    run(main)
