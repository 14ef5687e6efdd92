"""Weights of a file against those that a module has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_shapes(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raises ValueError with a phrase unless the `given` tensors are just the wanted ones, of their shapes; `prefix` is
    what the file writes before their names."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    for names, fault in ((missing, "are missing"), (unknown, "are unknown")):
        if names:
            raise ValueError(f"{len(names)} of its tensors {fault}, {prefix}{names[0]} among them")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            found, should = list(given[name].shape), list(tensor.shape)
            raise ValueError(f"it has {prefix}{name} of shape {found} where its sizes ask for {should}")
