"""Where things are: this checkout, the cache folder, the interpreter inside a virtual environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE_VARIABLE = "SUBJECT_PATCHES_CACHE"
_CACHE_NAME = "comfyui-subject-patches"


def cache_folder() -> Path:
    """The folder for everything the tools fetch: SUBJECT_PATCHES_CACHE, else one in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    if os.name == "nt":
        parent = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        parent = Path.home() / "Library" / "Caches"
    else:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return parent / _CACHE_NAME


def environment_python(environment: Path) -> Path:
    """The interpreter of the virtual environment in the folder `environment`."""
    return environment / "Scripts" / "python.exe" if os.name == "nt" else environment / "bin" / "python"
