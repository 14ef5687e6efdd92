"""The code is as ruff wants it, by the settings in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hosting.paths import ROOT


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_finds_nothing(command: list[str]) -> None:
    """Neither its rules nor its layout are broken anywhere."""
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
