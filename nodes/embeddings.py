"""The textual embeddings that a prompt names: files that an encoded prompt depends on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMED = re.compile(r"embedding:([^\s,:()]+)")
# As the host looks for them.
ENDINGS = ("", ".safetensors", ".pt", ".bin")


def embeddings_state(*texts: Any) -> list[tuple[str, int, int]]:
    """Stands for the embedding files that some texts name, as they are on the disk now, for `fingerprint_inputs`: the
    host keeps an encoded prompt until its inputs change, and a file is one of them. None, a text that comes by a link,
    may name any."""
    import folder_paths

    folders = [Path(each) for each in folder_paths.get_folder_paths("embeddings")]
    if any(not isinstance(text, str) for text in texts):
        paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in ENDINGS[1:]]
    else:
        paths = list(_named(folders, " ".join(texts)))
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(set(paths)) if path.is_file()]


def _named(folders: list[Path], text: str) -> Iterator[Path]:
    for name in NAMED.findall(text):
        for folder in folders:
            yield from (folder / f"{name}{ending}" for ending in ENDINGS)
