"""Files of a training, each written beside its place and moved there: a stop never leaves half a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def save_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file."""
    whole = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    _whole(path, lambda partial: save_file(whole, partial, metadata and dict(metadata)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a trainer's state: of modules and optimiser, and numbers."""
    _whole(path, lambda partial: torch.save(state, partial))


def load_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state of an earlier run, or None when there is none."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    write(partial)
    partial.replace(path)
