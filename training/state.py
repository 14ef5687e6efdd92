"""The file from which a training goes on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import folder_paths
from torch import Tensor

from ..patches.parts.writing import NAME_LIMIT, NAME_MAX, shortened
from .files import save_whole

FOLDER = "training"


@dataclass(frozen=True)
class StateFile:
    """The state of the training called `name`, in the host's output folder. `about` says what it trains: a training
    goes on only from a state about the same."""

    name: str
    about: dict[str, str]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w\-][\w\- .]*", self.name) or len(self.name.encode()) > NAME_MAX:
            raise ValueError(
                f"'{shortened(self.name)}' is no name for a training; write letters, digits, spaces, dots, - and _, "
                f"{NAME_LIMIT}, and no folder."
            )

    @property
    def path(self) -> Path:
        return Path(folder_paths.get_output_directory()) / FOLDER / f"{self.name}.safetensors"

    def save(self, tensors: dict[str, Tensor], values: dict[str, float]) -> None:
        """Writes the state whole or not at all."""
        save_whole(self.path, tensors, {"about": json.dumps(self.about), "values": json.dumps(values)})

    def load(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """What `save` wrote last, None if it never did. Raises ValueError when the file is about another training."""
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about, values = json.loads(metadata["about"]), json.loads(metadata["values"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"The training state {self.path} cannot be read ({error}); delete it to begin anew."
            ) from error
        for key in {**about, **self.about}:
            if about.get(key) != self.about.get(key):
                raise ValueError(
                    f"The training '{self.name}' was begun with another {key} ({about.get(key)}, now "
                    f"{self.about.get(key)}); give this training another name, or delete {self.path}."
                )
        return tensors, values
