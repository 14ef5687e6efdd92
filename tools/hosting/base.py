"""The base directory of a server: its models, inputs, outputs and custom nodes, with this checkout linked in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ToolError
from .paths import ROOT

PACK_FOLDER = "comfyui-subject-patches"
MANIFEST = ROOT / "weights_manifest.json"
_FOLDERS = ("models/checkpoints", "models/loras", "models/vae", "custom_nodes", "input", "output", "temp", "user")


def prepare(base: Path, checkpoints: Sequence[Path] = ()) -> None:
    """Fill `base` with what a server needs: the pack, which brings its weights and pictures itself, and `checkpoints`.

    May be called again on the same folder. Raises ToolError if a checkpoint is no file.
    """
    for folder in _FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    _link_folder(ROOT, base / "custom_nodes" / PACK_FOLDER)
    settings = base / "user" / "default" / "comfy.settings.json"
    if not settings.exists():
        # Without it the page opens with its list of templates on top.
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text('{"Comfy.TutorialCompleted": true}\n', encoding="utf-8")
    for checkpoint in checkpoints:
        if not checkpoint.is_file():
            raise ToolError(f"There is no checkpoint {checkpoint}; give the path of a .safetensors file.")
        _link_file(checkpoint.absolute(), base / "models" / "checkpoints" / checkpoint.name)


def remove(base: Path) -> None:
    """Delete a base directory; what is linked in it stays."""
    _unlink_folder(base / "custom_nodes" / PACK_FOLDER)
    shutil.rmtree(base, ignore_errors=True)


def manifest_entries() -> list[dict[str, Any]]:
    """The entries of weights_manifest.json, none if there is no such file."""
    if not MANIFEST.is_file():
        return []
    return json.loads(MANIFEST.read_text(encoding="utf-8"))["entries"]


def _unlink_folder(link: Path) -> None:
    if link.is_symlink():
        link.unlink()
    elif os.name == "nt" and link.exists() and link.resolve() != link.absolute():
        # Takes a junction away, and fails on a folder with something in it.
        link.rmdir()


def _link_folder(source: Path, link: Path) -> None:
    _unlink_folder(link)
    if link.exists():
        raise ToolError(f"{link} is in the way of a link to {source}; delete it and try again.")
    if os.name == "nt":
        import _winapi

        # Unlike a symbolic link, a junction needs no privilege.
        _winapi.CreateJunction(str(source), str(link))
    else:
        link.symlink_to(source, target_is_directory=True)


def _link_file(source: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    for make in (os.symlink, os.link):
        try:
            make(source, link)
        except OSError:
            continue
        return
    shutil.copyfile(source, link)
