"""Loads the pack into this process as the host does, under one fixed package name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from .device import use_cpu_without_gpu
from .errors import ToolError

PACKAGE = "subject_patches"


def import_host(tree: Path) -> None:
    """Makes the modules of the host in `tree` importable here, on the CPU where there is no GPU."""
    sys.path.insert(0, str(tree))
    use_cpu_without_gpu()


def load_pack(root: Path) -> None:
    """Imports the pack whose root is `root` as the package `subject_patches`; its nodes are `subject_patches.nodes`.

    Raises ToolError when the host cannot be imported here or `root` holds no pack."""
    # Where the root comes first, its `nodes` folder would hide the host's `nodes.py`.
    rest = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    sys.path[:] = [*rest, str(root)]
    if importlib.util.find_spec("comfy") is None:
        raise ToolError("ComfyUI cannot be imported here; run this through the host's interpreter.")
    spec = importlib.util.spec_from_file_location(PACKAGE, root / "__init__.py", submodule_search_locations=[str(root)])
    if spec is None or spec.loader is None or not (root / "__init__.py").is_file():
        raise ToolError(f"{root} holds no pack; use a complete checkout.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
