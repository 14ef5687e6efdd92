"""Where nodes that save write next: in a folder of their own, under a number that is free."""

from __future__ import annotations

import posixpath
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..patches.parts.writing import NAME_LIMIT, NAME_MAX, shortened
from .model_files import ENDING


def next_file(prefix: str, top: Path) -> Path:
    """The file that a node saves under a `filename_prefix`, which may name subfolders of the folder `top`; made so far
    that it can be written. Raises ValueError for a prefix that names no file in there."""
    import folder_paths

    written = prefix.replace("\\", "/")
    inside = PurePosixPath(posixpath.normpath(written))
    outside = inside.is_absolute() or ".." in inside.parts or PureWindowsPath(written).drive
    if outside or not inside.name or "\0" in written or any(len(part.encode()) > NAME_MAX for part in inside.parts):
        raise ValueError(
            f"The filename_prefix '{shortened(prefix)}' names no file in the folder {top.name}; write a name of "
            f"{NAME_LIMIT}, after the names of subfolders if you like."
        )
    try:
        folder, name, counter, *_ = folder_paths.get_save_image_path(str(inside), str(top))
    except OSError as error:
        raise ValueError(
            f"The filename_prefix '{shortened(prefix)}' cannot be saved under in the folder {top.name} ({error}); "
            "write another."
        ) from error
    return Path(folder) / f"{name}_{counter:05}_{ENDING}"
