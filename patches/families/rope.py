"""Rotary positions: what turns a recorded key from one place to another, and weakens what says where it is. Tensors
only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..parts.brought import Brought


def frequencies(sizes: Sequence[int], theta: float | Sequence[float]) -> Tensor:
    """How far each pair of a head's channels turns for a step along each axis, (axes, pairs) in float64. `sizes` are
    the channels of each axis, in their order in a head; pair i of an axis with n channels turns by theta^(-2 i / n).
    `theta` is that of all axes, or of each."""
    bases = [theta] * len(sizes) if isinstance(theta, (int, float)) else theta
    rates = torch.zeros(len(sizes), sum(sizes) // 2, dtype=torch.float64)
    first = 0
    for axis, size in enumerate(sizes):
        steps = torch.arange(0, size, 2, dtype=torch.float64) / size
        rates[axis, first : first + size // 2] = bases[axis] ** -steps
        first += size // 2
    return rates


def rope_of(embedder: Any) -> Rope:
    """That of the host's embedder of places in FLUX and what took it over."""
    return Rope(frequencies(embedder.axes_dim, embedder.theta))


@dataclass(frozen=True, eq=False)
class Rope:
    """A model's rotary positions: `rates` (axes, pairs), radians for one step along an axis. A pair is two neighbouring
    channels of a head, or with `halves` channel i of its first half and i of its second."""

    rates: Tensor
    halves: bool = False
    _brought: Brought = field(default_factory=Brought, init=False, repr=False)

    def rates_at(self, key: Tensor) -> Tensor:
        """The rates in float32 where a key is."""
        (rates,) = self._brought.to(key.new_empty(0, dtype=torch.float32), (self.rates,))
        return rates

    def rotated(self, key: Tensor, heads: int, shift: Sequence[float]) -> Tensor:
        """Keys (rows, n, channels) as they would be `shift` steps further along each axis, wherever they are: rotations
        add, R(d) R(p) k = R(p + d) k. Exact but for rounding."""
        angles = sum(steps * rates for steps, rates in zip(shift, self.rates_at(key), strict=True))
        cosine, sine = angles.cos(), angles.sin()
        first, second = self._pairs(key, heads)
        return self._joined(first * cosine - second * sine, first * sine + second * cosine, key)

    def weighted(self, key: Tensor, heads: int, weights: Tensor) -> Tensor:
        """Keys (rows, n, channels) with each pair of channels multiplied by its weight (pairs), which is where they
        are."""
        first, second = self._pairs(key, heads)
        return self._joined(first * weights, second * weights, key)

    def _pairs(self, key: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        split = key.float().unflatten(-1, (heads, 2, -1) if self.halves else (heads, -1, 2))
        return tuple(split.unbind(-2 if self.halves else -1))

    def _joined(self, first: Tensor, second: Tensor, key: Tensor) -> Tensor:
        return torch.stack([first, second], -2 if self.halves else -1).flatten(2).to(key.dtype)
