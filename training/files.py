"""Files of a training, each written beside its place and moved there: a stop never leaves half a file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises ValueError where it cannot be written."""
    whole = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    _whole(path, lambda partial: save_file(whole, partial, metadata and dict(metadata)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a trainer's state: of modules and optimiser, and numbers."""
    _whole(path, lambda partial: torch.save(state, partial))


def load_state(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The state of an earlier run, or None when there is none. Raises ValueError for a file that cannot be read."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"The training state {path} cannot be read; delete it to begin anew.") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is no state of a training; take another folder, or delete it to begin anew.")
    return state


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be written ({error}); see that its folder may be written to and that there is room."
        ) from error
