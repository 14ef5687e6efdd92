"""The whole pack for a trainer.

A trainer runs as `python -m toy.NAME` with the pack's root as the working directory, where `toy` is a package of its
own and cannot reach beside itself. What it needs of the pack it imports from `subject_patches`, as the tools and the
tests do.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load() -> None:
    """Makes the pack importable as `subject_patches`. Calling it again changes nothing."""
    if "subject_patches" not in sys.modules:
        sys.path.append(str(ROOT / "tools"))
        from hosting.pack import load_pack

        load_pack(ROOT)
