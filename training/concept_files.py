"""The files that a trained ICO concept is kept in, and what in them says which training made them."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from ..patches.parts.writing import NAME_LIMIT, NAME_MAX, shortened
from .embedding_files import named_embeddings
from .files import save_whole
from .loop import LossMap

KIND = "ICO concept"


@dataclass(frozen=True)
class Concept:
    """What a training leaves: [T] as an embedding of the host (S, width) for each encoder, the change of the
    projections as its LoRA loaders take it, and the loss of each step."""

    embedding: Mapping[str, Tensor]
    difference: Mapping[str, Tensor]
    losses: LossMap


@dataclass(frozen=True)
class ConceptFiles:
    """Where the concept called `name` is kept, in the host's own folder for each: its words as an embedding, and the
    change of the projections as a LoRA. What a file is about stands in both, so that one of another training is known.

    Raises ValueError when the name is no file's, or a file of that name was not made by this training."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w\-]*", self.name) or len(self.name.encode()) > NAME_MAX:
            raise ValueError(
                f"'{shortened(self.name)}' is no name for a concept; write letters, digits, - and _ only, {NAME_LIMIT}."
            )
        for path in self.paths:
            if path.exists() and _metadata(path).get("training") != KIND:
                raise ValueError(f"There is already another file {path}; give the concept another name.")
        lora = folder_paths.get_full_path("loras", self.lora.name)
        others = [Path(lora)] if lora else []
        for other in (*others, *named_embeddings(self.name)):
            if not any(_is_one(other, path) for path in self.paths):
                raise ValueError(
                    f"There is another file {other}, which ComfyUI would take in the place of the concept's own; give "
                    "the concept another name, or move that file away."
                )

    @property
    def embedding(self) -> Path:
        return Path(folder_paths.get_folder_paths("embeddings")[0]) / f"{self.name}.safetensors"

    @property
    def lora(self) -> Path:
        # Where the host's own trainer saves, and its LoRA loaders look.
        return Path(folder_paths.get_output_directory()) / "loras" / f"{self.name}.safetensors"

    @property
    def paths(self) -> tuple[Path, Path]:
        return (self.embedding, self.lora)

    def check_folders(self) -> None:
        """Raises ValueError where the files could not be written, before hours of training."""
        for path in self.paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path.parent):
                    pass
            except OSError as error:
                raise ValueError(
                    f"The concept cannot be saved in {path.parent} ({error}); make that folder writable."
                ) from error

    def about(self) -> dict[str, str] | None:
        """What the training was that made both files; None where one is missing, or they are of two trainings."""
        if not all(path.exists() for path in self.paths):
            return None
        words, changes = (_metadata(path) for path in self.paths)
        if not words.get("about") or words.get("about") != changes.get("about"):
            return None
        return dict(json.loads(words["about"]))

    def made_in(self) -> str:
        """The run of the host's queue that wrote the files, "" where that is not known."""
        return _metadata(self.embedding).get("made in", "") if self.embedding.exists() else ""

    def state(self) -> str:
        """Stands for the files as they are on the disk now: never the same again once one was written anew."""
        stats = [path.stat() for path in self.paths]
        return hashlib.sha256(repr([(s.st_mtime_ns, s.st_size) for s in stats]).encode()).hexdigest()[:16]

    def load(self, about: Mapping[str, str]) -> Concept | None:
        """The concept in the files, if they are of the training `about` says; else None."""
        from safetensors.torch import load_file

        if self.about() != dict(about):
            return None
        losses = json.loads(_metadata(self.embedding).get("losses", "[]"))
        return Concept(load_file(self.embedding), load_file(self.lora), {"loss": losses})

    def save(self, concept: Concept, about: Mapping[str, str], made_in: str = "") -> None:
        """Writes both files, each whole or not at all."""
        metadata = {"training": KIND, "about": json.dumps(about), "made in": made_in}
        losses = {"losses": json.dumps(concept.losses["loss"])}
        for path, tensors, more in (
            (self.lora, concept.difference, {}),
            (self.embedding, concept.embedding, losses),
        ):
            save_whole(path, tensors, {**metadata, **more})


def _is_one(found: Path, path: Path) -> bool:
    """Whether the host takes `path` though another file of its name was found: of a folder's it takes the ending
    .safetensors before others."""
    beside = bool(found.suffix) and found.with_suffix(path.suffix) == path
    return beside or (path.exists() and found.samefile(path))


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes."""
    return sum(each.numel() * torch.finfo(each.dtype).bits // 8 for each in tensors.values())


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}
