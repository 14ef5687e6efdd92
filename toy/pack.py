"""The whole pack for a trainer that needs its other parts.

A trainer runs as `python -m toy.NAME` with the pack's root as the working directory, where `toy` is a package of its
own and cannot reach beside itself. What reaches further lives in modules that are imported from `subject_patches`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load() -> None:
    """Makes the pack importable as `subject_patches`, as the tools and the tests have it. Calling it again changes
    nothing."""
    if "subject_patches" not in sys.modules:
        sys.path.append(str(ROOT / "tools"))
        from hosting.pack import load_pack

        load_pack(ROOT)
