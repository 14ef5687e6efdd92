"""Tensors that a run brings to where its attentions are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Brought:
    """What of some tensors one run has brought to a device and a type: at every layer and step, copies from the CPU
    would make a GPU wait."""

    _there: dict[Hashable, tuple[Tensor, ...]] = field(default_factory=dict)

    def to(self, like: Tensor, tensors: Iterable[Tensor], name: Hashable = None) -> tuple[Tensor, ...]:
        """The tensors called `name`, on the device and in the type of another."""
        place = (name, like.device, like.dtype)
        if place not in self._there:
            self._there[place] = tuple(each.to(like) for each in tensors)
        return self._there[place]
