"""How often a U-Net's transformers run, shared by the tests of trainings: twice with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from comfy.ldm.modules.attention import SpatialTransformer
from torch import nn


@dataclass
class Forwards:
    """How many transformers have begun, of whatever U-Net."""

    count: int = 0


@contextmanager
def counted_forwards() -> Iterator[Forwards]:
    """Counts while it is open."""
    found = Forwards()

    def begins(module: nn.Module, _given: Any) -> None:
        # Not how many end: one that is computed again stops as soon as the gradient has what it needs.
        found.count += isinstance(module, SpatialTransformer)

    handle = nn.modules.module.register_module_forward_pre_hook(begins)
    try:
        yield found
    finally:
        handle.remove()
