"""Which ComfyUI the tools use: the one that COMFYUI_PATH names, the one that the pack is installed in, or the private
one."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import ToolError
from .paths import ROOT
from .pip import clean_environment
from .private import DEVELOPMENT, ensure_host, host_folder

PATH_VARIABLE = "COMFYUI_PATH"
OLDEST_COMFYUI = (0, 30, 0)
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)


@dataclass(frozen=True)
class Host:
    """A ComfyUI: its source tree, the interpreter that runs it, and whether it is the tools' private one."""

    python: Path
    tree: Path
    private: bool

    @property
    def running(self) -> bool:
        """Whether the present process is already run by the host's interpreter."""
        return not self.private or _runs_in(self.python.parent.parent)

    def environment(self) -> dict[str, str]:
        """Environment variables for a Python program that imports the host's modules and this checkout's folders.

        The host's tree comes first: its `nodes` module must win over this checkout's `nodes` folder.
        """
        folders = (self.tree, ROOT / "tools", ROOT)
        return clean_environment() | {
            "PYTHONPATH": os.pathsep.join(str(folder) for folder in folders),
            # Keeps the working directory and the script's folder from coming before them (Python 3.11 and later).
            "PYTHONSAFEPATH": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def find_host(*, offline: bool = False, development: bool = False, installed: bool = False) -> Host:
    """The ComfyUI to use, set up first where it is the private one.

    `development` makes sure of what the tests need. Where `installed`, a pack in a ComfyUI's custom_nodes takes that
    ComfyUI. Raises ToolError with one sentence where that is not possible.
    """
    check_python(sys.version_info[:2])
    named, around = os.environ.get(PATH_VARIABLE), ROOT.parent.parent
    if named:
        tree, said = Path(named).expanduser().absolute(), f"{PATH_VARIABLE} is"
        return _running_host(tree, said, f", or unset {PATH_VARIABLE} to use a private one", development)
    if installed and _is_comfyui(around) and not _runs_in(host_folder() / "environment"):
        return _running_host(around, "This pack is in", "", development)
    python, tree = ensure_host(offline=offline, development=development)
    return Host(python, tree, private=True)


def check_python(version: tuple[int, int]) -> None:
    """Raise ToolError where ComfyUI's packages do not exist for this version of Python."""
    if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        raise ToolError(
            f"This is Python {version[0]}.{version[1]}, and the tools need one from 3.10 to 3.13; "
            "run the command with such an interpreter, for instance python3.12."
        )


def _is_comfyui(tree: Path) -> bool:
    return (tree / "main.py").is_file() and (tree / "comfy" / "samplers.py").is_file()


def _runs_in(environment: Path) -> bool:
    """Whether the present process is run by the interpreter of a virtual environment."""
    # The prefix and not the executable: an environment's interpreter is a link to the one it was made from.
    return Path(sys.prefix).resolve() == environment.resolve()


def _running_host(tree: Path, said: str, otherwise: str, development: bool) -> Host:
    """The ComfyUI in `tree`, with the Python that is running; `said` and `otherwise` are words of the sentences."""
    if not _is_comfyui(tree):
        raise ToolError(
            f"{said} {tree}, which holds no ComfyUI; set it to the folder with ComfyUI's main.py{otherwise}."
        )
    version = _version(tree)
    if version < OLDEST_COMFYUI:
        raise ToolError(
            f"{said} {tree}, which holds ComfyUI {'.'.join(map(str, version))}, and this pack needs 0.30.0 or later; "
            f"update it{otherwise}."
        )
    wanted = _required_packages(tree) + (_names(DEVELOPMENT) if development else [])
    missing = [name for name in wanted if not _installed(name)]
    if missing:
        raise ToolError(
            f"{said} {tree}, and {sys.executable} lacks {', '.join(missing)}; run the command with the interpreter of "
            f"that ComfyUI or install them there{otherwise}."
        )
    return Host(Path(sys.executable), tree, private=False)


def _version(tree: Path) -> tuple[int, ...]:
    try:
        text = (tree / "comfyui_version.py").read_text(encoding="utf-8")
    except OSError:
        return (0,)
    found = re.search(r"__version__ = \"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(int(number) for number in found.groups()) if found else (0,)


def _required_packages(tree: Path) -> list[str]:
    try:
        text = (tree / "requirements.txt").read_text(encoding="utf-8")
    except OSError:
        return []
    # What follows this comment the host itself can do without.
    essential = text.split("#non essential")[0]
    return _names(essential.splitlines())


def _names(requirements: Iterable[str]) -> list[str]:
    found = (re.match(r"[A-Za-z0-9._-]+", line) for line in requirements)
    return [name.group() for name in found if name]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
