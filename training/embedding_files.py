"""The files of textual embeddings, as the host looks for them by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# In this order.
ENDINGS = ("", ".safetensors", ".pt", ".bin")


def _folders() -> Iterator[tuple[Path, list[str]]]:
    """Each folder in which the host looks, those of embeddings with all their subfolders, linked ones too, and the
    names of the files in it."""
    import folder_paths

    for top in folder_paths.get_folder_paths("embeddings"):
        for folder, _, files in os.walk(top, followlinks=True):
            yield Path(folder), files


def named_embeddings(name: str) -> list[Path]:
    """Every file that "embedding:name" may mean; the host takes one of them, and not always the same."""
    paths = (folder / f"{name}{ending}" for folder, _ in _folders() for ending in ENDINGS)
    # Of a name that no file can have, too.
    return [path for path in paths if os.path.isfile(path)]  # noqa: PTH113


def all_embeddings() -> list[Path]:
    """Every file that some name may mean."""
    return [folder / name for folder, names in _folders() for name in names if name.endswith(ENDINGS[1:])]
