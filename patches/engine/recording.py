"""What a companion stream's pass over the model gives: its features at one noise level."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..parts.sites import Site
from .streams import Features, Stream


@dataclass
class Recording:
    """A stream's features at one noise level: those the cache had, and those still to be recorded at `sites`.
    `left_out` are the other packs' patches that the pass runs without; see `companion.py`."""

    stream: Stream
    parts: tuple[str, ...]
    key: tuple[Any, ...] | None
    run: object
    sites: frozenset[Site] = frozenset()
    features: dict[Site, Features] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return not self.sites

    def load(self, sites: Iterable[Site], device: torch.device) -> None:
        """Takes from the stream's cache what it has for these sites; the others are left to be recorded."""
        missing = frozenset(sites) - self.features.keys()
        if self.key and missing:
            self.features |= self.stream.cache.get((*self.key, self.parts), missing, self.run, device)
        self.sites = missing - self.features.keys()

    def record(self, site: Site, grid: tuple[int, int], features: Features) -> None:
        """Keeps what the stream wants of a site's features."""
        self.features[site] = self.stream.keep(site, grid, {part: features[part] for part in self.parts})

    def begin_again(self, without: str) -> None:
        """The pass is to be run once more, without another pack's patches."""
        self.left_out.add(without)
        for site in self.sites:
            self.features.pop(site, None)

    def finish(self, offload: torch.device) -> None:
        """Gives what was recorded to the stream's cache."""
        if self.key:
            # Another pack may have skipped some of the layers.
            made = {site: self.features[site] for site in self.sites & self.features.keys()}
            self.stream.cache.put((*self.key, self.parts), made, self.run, offload)
        self.sites = frozenset()
