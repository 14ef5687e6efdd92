"""Bias: what an edit adds to the logits of some of an attention's keys. Tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Rows of a mask begin at multiples of as many elements: kernels of GPUs want that, or copy it.
_ALIGNED = 8


@dataclass(frozen=True)
class Bias:
    """Added to the scaled logits of the keys from `start` to `stop`: `values` are broadcastable to (rows, queries,
    stop - start)."""

    values: Tensor
    start: int
    stop: int

    def part(self, start: int, stop: int) -> Bias | None:
        """What of it is for the keys from `start` to `stop`; None for none of them."""
        first, last = max(self.start, start), min(self.stop, stop)
        if first >= last:
            return None
        shared = self.values.shape[-1:] in ((), (1,))
        return Bias(self.values if shared else self.values[..., first - self.start : last - self.start], first, last)

    def moved(self, by: int) -> Bias:
        """The same for keys that stand `by` further behind."""
        return Bias(self.values, self.start + by, self.stop + by)

    def without(self, start: int, stop: int, instead: int = 0) -> list[Bias]:
        """What is left of it when the keys from `start` to `stop` go and `instead` so many others come."""
        before, behind = self.part(0, start), self.part(stop, self.stop)
        more = instead - (stop - start)
        return [each for each in (before, behind and behind.moved(more)) if each is not None]

    def at(self, places: Tensor | None, device: torch.device) -> Tensor:
        """Its values (rows or 1, queries or 1, n or 1) on a device, for some queries; None are all. One number on the
        CPU stays there: a copy would wait for a GPU, and tensors of every device take it as it is."""
        values = self.values.expand(*(1,) * (3 - self.values.ndim), *self.values.shape)
        values = values if _is_number(values) else values.to(device)
        return values if places is None or values.shape[1] == 1 else values[:, places]


def _is_number(values: Tensor) -> bool:
    return values.numel() == 1 and values.device.type == "cpu"


def summed(biases: Sequence[Bias], keys: int, device: torch.device) -> Tensor | None:
    """The sum of biases over so many keys, as one tensor broadcastable to (rows, queries, keys) in float32 on a device;
    None without any."""
    return mask_of([(each, None) for each in biases], keys, torch.empty(0, device=device)) if biases else None


def mask_of(biases: Sequence[tuple[Bias, Tensor | None]], keys: int, like: Tensor) -> Tensor:
    """What an attention over so many keys adds to its logits, of biases at some queries each (`Bias.at`): broadcastable
    to (rows, queries, keys), one for all heads, and with one row or query where no bias has more. In the type and on
    the device of `like`."""
    parts = [(each, each.at(places, like.device)) for each, places in biases]
    rows, queries = (max(values.shape[dimension] for _, values in parts) for dimension in (0, 1))
    spans = sorted((each.start, each.stop) for each, _ in parts)
    # Sums are exact before they are rounded to a half precision.
    overlap = any(start < stop for (_, stop), (start, _) in pairwise(spans))
    dtype = torch.float32 if overlap else like.dtype
    mask = torch.zeros(rows, queries, -(-keys // _ALIGNED) * _ALIGNED, dtype=dtype, device=like.device)
    for each, values in parts:
        mask[..., each.start : each.stop] += float(values) if _is_number(values) else values
    return mask.to(like.dtype)[..., :keys]


def per_head(bias: Tensor) -> Tensor:
    """A bias broadcastable to (rows, queries, keys), made broadcastable to (rows, heads, queries, keys)."""
    return bias.float().expand(*(1,) * max(0, 3 - bias.ndim), *bias.shape).unsqueeze(1)


def of_queries(bias: Tensor, queries: slice, dimension: int = 1) -> Tensor:
    """A bias for some queries, of one that is the same for all or has each's."""
    if bias.shape[dimension] == 1:
        return bias
    return bias[(slice(None),) * dimension + (queries,)]
