"""Routes by a trained router (AnyStory, section 3.3): each cross-attention's features say which place is whose.

The networks are `encoders/router.py`'s. Where noise is high no router knows what will be where, trained or not: there
the phrases' attention maps may go before, as long as the prompt has the phrases.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.edit import Start
from ..engine.streams import Features, Stream
from ..parts.brought import Brought
from ..parts.sites import Site
from ..parts.window import Levels, Window
from .attention_maps import resized
from .map_router import MapRouter, MapRouting
from .router import Route, Routing, names_of, preceding
from .subject import Subject


def route_of_logits(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """The argmax of Eq. 5 and 8 at a grid: logits (rows, n + 1, height, width), the background's last, to (rows,
    places) of 0 to n. A layer of another size than the one that gave them has them interpolated."""
    return resized(logits, grid).flatten(2).argmax(1)


@dataclass(frozen=True, eq=False)
class LearnedRouter:
    """Routes by the router in the file `encoder`: `patcher` holds its networks, for the host to move. `refined` takes
    the refined maps, else the coarse. From the share `learned_from` of the schedule on it decides; before that, where
    the prompt has a phrase of every subject, their attention maps by `early`, or where that is None it all the same."""

    encoder: str
    patcher: Any
    refined: bool = True
    early: MapRouter | None = None
    learned_from: float = 0.0

    @property
    def models(self) -> tuple[Any, ...]:
        return (self.patcher,)

    def routing(
        self, subjects: Sequence[Subject], order: Sequence[Site], acting: frozenset[Site], window: Window
    ) -> LearnedRouting:
        cross = frozenset(site for site in order if site.kind == "cross")
        if cross != self.patcher.model.sites:
            raise ValueError(
                f"The router of '{self.encoder}' is for a U-Net with {len(self.patcher.model.sites)} cross-attentions, "
                f"but this model has {len(cross)}, or others; load the encoder for this model's family."
            )
        features = self._features(subjects)
        before = preceding(order)
        read = frozenset(before[site] for site in acting if site in before)
        until = Window(0.0, self.learned_from, window.origin)
        early = None
        if self.early is not None and not until.empty and all(subject.phrase for subject in subjects):
            early = self.early.routing(subjects, order, acting, window)
        sites = acting | read if early is None else acting | read | early.sites
        # The early maps' mean begins with the run, whatever part of it the references are shown in.
        within = window if early is None else Window(0.0, window.end_percent, window.origin)
        return LearnedRouting(
            sites, within, names_of(subjects), router=self, features=features, before=before, read=read, early=early,
            until=until,
        )  # fmt: skip

    def _features(self, subjects: Sequence[Subject]) -> Tensor:
        made = []
        for number, subject in enumerate(subjects, 1):
            feature = None if subject.encoded is None else subject.encoded.routing
            if feature is None or feature.encoder != self.encoder:
                how = "no routing feature" if feature is None else f"a routing feature of '{feature.encoder}'"
                raise ValueError(
                    f"Subject {number} has {how}, but the router is that of '{self.encoder}'; put Encode Subjects with "
                    "that encoder, and its vision model, in the subject's way."
                )
            made.append(feature)
        return torch.cat([*(feature.own for feature in made), made[0].background])[None]


@dataclass(frozen=True, eq=False, kw_only=True)
class LearnedRouting(Routing):
    """Reads each conditioning's own chunks at `read`; `features` (1, n + 1, width) are R, the background's last, and
    `before` gives the cross-attention before a site. Until the end of `until` the `early` maps go before."""

    router: LearnedRouter
    features: Tensor
    before: Mapping[Site, Site]
    read: frozenset[Site]
    early: MapRouting | None
    until: Window
    _brought: Brought = field(default_factory=Brought, init=False, repr=False)
    _logits: dict[Hashable, tuple[float, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _now: dict[str, Any] = field(
        default_factory=lambda: {"levels": Levels(), "sigma": float("nan"), "early": False}, init=False, repr=False
    )

    def begin(self) -> LearnedRouting:
        return replace(self, early=None if self.early is None else self.early.begin())

    def start(self, start: Start) -> None:
        self._now["levels"] = start.levels

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if sigma != self._now["sigma"]:
            early = self.early is not None and self._now["levels"].lie_in(self.until, sigma)
            self._now.update(sigma=sigma, early=early)
        super().amend(call, sigma, recorded)

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if self._is_early(call):
            self.early.observe(call, sigma, recorded)
        if call.site not in self.read:
            return
        if call.grid is None:
            call.leave("Route Subjects by Encoder")
            return
        query = call.query.float()
        (features,) = self._brought.to(query, (self.features,))
        maps = self.router.patcher.model.maps(call.site, query, features)
        logits = maps[1 if self.router.refined else 0].unflatten(-1, call.grid)
        self._logits[_place(call, call.site)] = (sigma, logits)

    def _is_early(self, call: AttentionCall) -> bool:
        """Whether the attention maps decide: of some phrases alone they would give the others' subjects no place."""
        return self._now["early"] and self.early.knows_all(call)

    def _find(self, call: AttentionCall) -> Route | None:
        route = self.early.route(call) if self._is_early(call) else None
        if route is not None:
            return route
        # Nothing of an earlier step, where another pack skipped the layer in this one.
        kept, logits = self._logits.get(_place(call, self.before.get(call.site)), (None, None))
        if kept != self._now["sigma"] or len(logits) != len(call.query):
            return None
        return Route(route_of_logits(logits, call.grid).cpu(), len(self.names))


def _place(call: AttentionCall, site: Site | None) -> Hashable:
    """A layer of the pass of a call, as a key."""
    return (call.chunk.conditioning.get("uuid"), call.chunk.name, call.chunk.part, site)
