"""The pack's folders of models, and how a node loads a file of one by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from comfy_api.latest import io

from .shipped_files import PACK

ENDING = ".safetensors"


@dataclass(frozen=True)
class ModelFolder:
    """A folder of safetensors files among the host's folders of models; `further` are other places of such."""

    name: str
    further: tuple[Path, ...] = ()

    def register(self) -> None:
        """Makes the host know it. Calling it again changes nothing."""
        import folder_paths

        for place in (Path(folder_paths.models_dir) / self.name, *self.further):
            folder_paths.add_model_folder_path(self.name, str(place))
        folder_paths.folder_names_and_paths[self.name][1].add(ENDING)

    def file_input(self, tooltip: str, kind: str = "") -> io.Combo.Input:
        """The file of a node that loads one; those whose names begin with `kind` come first, where the folder has
        several kinds, since a new node has the first."""
        import folder_paths

        # Another pack may keep files of other endings in a folder of this name.
        files = [name for name in folder_paths.get_filename_list(self.name) if name.endswith(ENDING)]
        files.sort(key=lambda name: not PurePath(name).name.startswith(kind))
        return io.Combo.Input("file", options=files, tooltip=tooltip)

    def state(self, file: str) -> Any:
        """What changes with a file's content, for `fingerprint_inputs`: another file under the same name has other
        weights."""
        import folder_paths

        path = folder_paths.get_full_path(self.name, file)
        if path is None:
            return file
        state = Path(path).stat()
        return (file, state.st_size, state.st_mtime_ns)

    def path(self, file: str) -> Path:
        """Where a file is. Raises ValueError where the folder has none of its name."""
        import folder_paths

        path = folder_paths.get_full_path(self.name, file)
        if path is None or not file.endswith(ENDING):
            raise ValueError(f"There is no safetensors file '{file}' in the models folder {self.name}; choose another.")
        return Path(path)


RESIDUAL_TOKENS = ModelFolder("residual_tokens")
# Where IP-Adapter's packs have theirs.
ADAPTERS = ModelFolder("ipadapter")
# Encoders of both kinds, AnyLogo's maps, and the toy's.
SUBJECT_ENCODERS = ModelFolder("subject_encoders", (PACK / "toy" / "encoders",))


def register_folders() -> None:
    """Makes the host know all of them. Calling it again changes nothing."""
    for folder in (RESIDUAL_TOKENS, ADAPTERS, SUBJECT_ENCODERS):
        folder.register()
