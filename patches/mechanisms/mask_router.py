"""Routes by masks: a place goes to the subject whose mask covers most of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.call import AttentionCall
from ..parts.prompt import canonical
from ..parts.sites import Site
from ..parts.window import Window
from .region import region_at
from .router import Route, Routing, names_of
from .subject import Subject


def route_of_cover(cover: Tensor) -> Tensor:
    """The subject that covers most of each place, or the background where it covers more: cover (n, places) of 0 to 1,
    disjoint, to (1, places) of 0 to n, n being the background.

    A subject that is everywhere too thin for that keeps the place it covers most, so a small one is never lost at a
    coarse site."""
    count = len(cover)
    most, subject = cover.max(0)
    route = torch.where(most >= 1 - cover.sum(0), subject, count)
    for number in range(count):
        best = cover[number].argmax()
        if cover[number, best] > 0 and not bool((route == number).any()):
            route[best] = number
    return route[None]


@dataclass(frozen=True, eq=False)
class MaskRouter:
    """Routes by masks (n, height, width) bool, which do not overlap; `phrases` says whose each is, or is empty where
    they go with the subjects in their order."""

    masks: Tensor
    phrases: tuple[str, ...] = ()

    models: ClassVar[tuple[Any, ...]] = ()

    def routing(
        self, subjects: Sequence[Subject], order: Sequence[Site], acting: frozenset[Site], window: Window
    ) -> MaskRouting:
        masks = self._of([subject.phrase for subject in subjects])
        return MaskRouting(acting, window, names_of(subjects), masks=masks)

    def _of(self, phrases: Sequence[str]) -> Tensor:
        known = [canonical(phrase) for phrase in self.phrases]
        wanted = [canonical(phrase) for phrase in phrases]
        if len(self.masks) != len(phrases):
            raise ValueError(
                f"The router has regions for {len(self.masks)} subjects but there are {len(phrases)}; give as many of "
                "the one as of the other."
            )
        if not known:
            return self.masks
        for name, phrase in zip(wanted, phrases, strict=True):
            if name not in known or wanted.count(name) > 1:
                raise ValueError(
                    f"The router's layout has no region for the subject '{phrase}' alone; its phrases are "
                    f"{', '.join(self.phrases)}: give every subject a phrase of its own, the same in both."
                )
        return self.masks[[known.index(name) for name in wanted]]


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskRouting(Routing):
    """The same route at every step: `masks` (n, height, width)."""

    masks: Tensor
    _routes: dict[Hashable, Route] = field(default_factory=dict, init=False, repr=False)

    def _find(self, call: AttentionCall) -> Route:
        chunk = call.chunk
        place = (call.grid, chunk.part, chunk.latent)
        if place not in self._routes:
            cover = torch.cat([region_at(mask[None], chunk, call.grid, 1) for mask in self.masks.float()])
            self._routes[place] = Route(route_of_cover(cover), len(self.masks))
        return self._routes[place]
