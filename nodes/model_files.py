"""Files in the host's folders of models, for nodes that load one by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def add_folder(folder: str, *further: Path) -> None:
    """Makes the host know a folder of models, for safetensors files, and `further` places of such. Calling it again
    changes nothing."""
    import folder_paths

    for place in (Path(folder_paths.models_dir) / folder, *further):
        folder_paths.add_model_folder_path(folder, str(place))
    folder_paths.folder_names_and_paths[folder][1].add(".safetensors")


def state_of(folder: str, file: str) -> Any:
    """What changes with a file's content: another file under the same name has other weights."""
    import folder_paths

    path = folder_paths.get_full_path(folder, file)
    if path is None:
        return file
    state = Path(path).stat()
    return (file, state.st_size, state.st_mtime_ns)


def path_of(folder: str, file: str) -> Path:
    """Where a file is. Raises ValueError where the folder has none of its name."""
    import folder_paths

    path = folder_paths.get_full_path(folder, file)
    if path is None or not file.endswith(".safetensors"):
        raise ValueError(f"There is no safetensors file '{file}' in the models folder {folder}; choose another.")
    return Path(path)
