"""A bounded store of features that a subject keeps between runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Entry:
    features: dict[str, Tensor]
    size: int
    run: object


@dataclass
class FeatureCache:
    """Features by key, at most `max_bytes` of them, the least recently used dropped first.

    What the present run itself put in or used is never dropped for it: a run visits its keys in one order, so
    dropping its own oldest for its newest would leave the next run nothing. A run too big for the cache keeps
    what fits. `large` is the size in bytes from which everything is kept on the offload device."""

    max_bytes: int
    large: int = 512 * 2**20
    _entries: OrderedDict[Hashable, _Entry] = field(default_factory=OrderedDict, repr=False)
    _size: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._size

    def get(self, key: Hashable, run: object, device: torch.device) -> dict[str, Tensor] | None:
        """The features of a key on `device`, or None; they count as used by `run` from now on."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.run = run
        self._entries.move_to_end(key)
        return {name: tensor.to(device, non_blocking=True) for name, tensor in entry.features.items()}

    def put(self, key: Hashable, features: Mapping[str, Tensor], run: object, offload: torch.device) -> None:
        """Keeps features under a key if they fit beside what `run` already has here."""
        size = sum(t.numel() * t.element_size() for t in features.values())
        if key in self._entries or size > self.max_bytes:
            return
        foreign = [k for k, entry in self._entries.items() if entry.run is not run]
        while self._size + size > self.max_bytes and foreign:
            self._size -= self._entries.pop(foreign.pop(0)).size
        if self._size + size > self.max_bytes:
            return
        kept = {name: tensor.detach().clone() for name, tensor in features.items()}
        if self._size + size > self.large:
            kept = {name: tensor.to(offload) for name, tensor in kept.items()}
        self._entries[key] = _Entry(kept, size, run)
        self._size += size
