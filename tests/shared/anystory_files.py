"""AnyStory's golden weights, and a file of the form that its authors publish with them."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy.ldm.flux.redux import ReduxImageEncoder
from safetensors.torch import load_file
from torch import Tensor

from .golden_cases import file_of

_FILES = {"ref": "weights_ref_lora", "router": "weights_router", "redux": "weights_redux"}


def _read(name: str) -> dict[str, Tensor]:
    return load_file(file_of("anystory", f"{name}.safetensors"))


def published() -> dict[str, dict[str, Tensor]]:
    """The three dictionaries, small: what anystory_flux.bin holds."""
    parts = {part: _read(file) for part, file in _FILES.items()}
    return parts | {"redux": {name: t for name, t in parts["redux"].items() if not name.startswith("base.")}}


def _redux_weights() -> dict[str, Tensor]:
    """The plain Redux model's weights, as the host names them."""
    named = _read(_FILES["redux"])
    return {name.removeprefix("base."): tensor for name, tensor in named.items() if name.startswith("base.")}


def redux() -> ReduxImageEncoder:
    """The host's Redux model with the small weights."""
    weights = _redux_weights()
    context, inner = weights["redux_down.weight"].shape
    module = ReduxImageEncoder(weights["redux_up.weight"].shape[1], context)
    assert inner == 3 * context
    module.load_state_dict(weights)
    return module


def publish(path: Path, parts: object = None) -> Path:
    """Writes them as the authors do."""
    torch.save(published() if parts is None else parts, path)
    return path
