"""A bounded store of features that a subject keeps between runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sites import Site

MEGABYTE = 2**20
# What a site's features are kept as: "query", "key", "value" or "output", each (rows, tokens, channels).
Features = Mapping[str, Tensor]


@dataclass
class _Entry:
    features: dict[Site, Features]
    size: int
    run: object


@dataclass
class FeatureCache:
    """Features of sites by key, at most `max_bytes` of them, the least recently used key dropped first. A key stands
    for one pass of the model: without some of its sites the pass has to run again, so they come and go together.

    What the present run itself put in or used is never dropped for it: a run visits its keys in one order, so
    dropping its own oldest for its newest would leave the next run nothing. A run too big for the cache keeps
    what fits. Features are kept where the host's outputs are: they outlive the run, and the host can free no memory of
    theirs."""

    max_bytes: int
    _entries: OrderedDict[Hashable, _Entry] = field(default_factory=OrderedDict, repr=False)
    _size: int = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._size

    def clear(self) -> None:
        """Lets everything go."""
        self._entries.clear()
        self._size = 0

    def get(self, key: Hashable, sites: Iterable[Site], run: object, device: torch.device) -> dict[Site, Features]:
        """Those of the sites that it has under a key, on `device`; the key counts as used by `run` from now on."""
        entry = self._entries.get(key)
        if entry is None:
            return {}
        entry.run = run
        self._entries.move_to_end(key)
        return {
            site: {name: tensor.to(device, non_blocking=True) for name, tensor in entry.features[site].items()}
            for site in sites
            if site in entry.features
        }

    def put(self, key: Hashable, features: Mapping[Site, Features], run: object, offload: torch.device) -> None:
        """Keeps the features of more sites under a key, on the `offload` device, if they all fit beside what `run`
        already has here."""
        entry = self._entries.get(key) or _Entry({}, 0, run)
        new = {site: parts for site, parts in features.items() if site not in entry.features}
        size = sum(t.numel() * t.element_size() for parts in new.values() for t in parts.values())
        if not new or size > self.max_bytes:
            return
        foreign = [k for k, other in self._entries.items() if other.run is not run and other is not entry]
        while self._size + size > self.max_bytes and foreign:
            self._size -= self._entries.pop(foreign.pop(0)).size
        if self._size + size > self.max_bytes:
            return
        for site, parts in new.items():
            entry.features[site] = {name: tensor.detach().to(offload, copy=True) for name, tensor in parts.items()}
        entry.size += size
        entry.run = run
        self._entries[key] = entry
        self._size += size
