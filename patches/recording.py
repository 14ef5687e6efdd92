"""What a companion stream's pass over the model gives: its features at one noise level."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from .sites import Site
from .streams import Features, Stream


@dataclass
class Recording:
    """A stream's features at one noise level: those the cache had, and those still to be recorded at `sites`."""

    stream: Stream
    parts: tuple[str, ...]
    key: tuple[Any, ...] | None
    run: object
    sites: frozenset[Site] = frozenset()
    features: dict[Site, Features] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return not self.sites

    def load(self, sites: Iterable[Site], device: torch.device) -> None:
        """Takes from the stream's cache what it has for these sites; the others are left to be recorded."""
        missing = []
        for site in sites:
            if site in self.features:
                continue
            cached = self.stream.cache.get((*self.key, site, self.parts), self.run, device) if self.key else None
            if cached is None:
                missing.append(site)
            else:
                self.features[site] = cached
        self.sites = frozenset(missing)

    def record(self, site: Site, grid: tuple[int, int], features: Features) -> None:
        """Keeps what the stream wants of a site's features."""
        self.features[site] = self.stream.keep(site, grid, {part: features[part] for part in self.parts})

    def finish(self, offload: torch.device) -> None:
        """Gives what was recorded to the stream's cache."""
        if self.key:
            # Another pack may have skipped some of the layers.
            for site in self.sites & self.features.keys():
                self.stream.cache.put((*self.key, site, self.parts), self.features[site], self.run, offload)
        self.sites = frozenset()
