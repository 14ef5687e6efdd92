"""Which place of the picture belongs to which subject: AnyStory's routing maps, without its learned router.

A route gives every place to one subject or to the background (the one-hot maps of section 3.3). It comes from masks, or
from the subjects' own cross-attention maps: there the phrase that a place attends to most takes it, if that is enough.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .attention_maps import attention_maps, normalised, resized, smoothed
from .call import AttentionCall
from .edit import Edit
from .layout_regions import canonical
from .prompt import SPANS_KEY, Spans
from .region import region_at
from .sites import Site
from .streams import Features, Stream
from .window import Window

MOST_SUBJECTS = 8

# Equations


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


def route_of_maps(maps: Tensor, threshold: float) -> Tensor:
    """The subject whose map is highest at each place, or the background where none is above `threshold`: maps (rows, n,
    height, width) of 0 to 1 to (rows, places) of 0 to n, n being the background."""
    most, subject = maps.flatten(2).max(1)
    return torch.where(most > threshold, subject, maps.shape[1])


def one_hot(route: Tensor, count: int) -> Tensor:
    """sigma(M_i) of Eq. 5 and 8: (rows, places) of 0 to `count` to (rows, count, places) of 0 and 1. The background's
    map is left out: it is the complement of the others."""
    return functional.one_hot(route, count + 1)[..., :count].mT.float()


# Routing in a run


@dataclass(frozen=True, eq=False)
class Routing(Edit):
    """The routes of one run, which the edits behind it ask for. Amends nothing; notes its maps at `sites`.

    `names` are the subjects', for notes."""

    names: tuple[str, ...]
    _last: list[Any] = field(default_factory=list, repr=False)

    def _find(self, call: AttentionCall) -> Tensor | None:
        raise NotImplementedError

    def route(self, call: AttentionCall) -> Tensor | None:
        """Who has each place of a call: (1 or rows, queries) of 0 to n on the CPU, n being the background; None where
        nothing is known of its places."""
        if not self._last or self._last[0]() is not call:
            self._last[:] = [weakref.ref(call), None if call.grid is None else self._find(call)]
        return self._last[1]

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if call.site.kind != "self":
            return
        route = self.route(call)
        if route is not None:
            count = len(self.names)
            call.note("routing map", lambda: one_hot(route, count).unflatten(-1, call.grid), self.names)


class Router(Protocol):
    """The value on a ROUTER link."""

    def routing(
        self, phrases: Sequence[str], order: Sequence[Site], acting: frozenset[Site], window: Window
    ) -> Routing:
        """The routing of subjects with these phrases. `order` are the model's sites as they run, `acting` those where
        routes will be asked for.

        Raises ValueError when the router does not fit the subjects."""


# By masks


@dataclass(frozen=True, eq=False)
class MaskRouter:
    """Routes by masks (n, height, width) bool, which do not overlap; `phrases` says whose each is, or is empty where
    they go with the subjects in their order."""

    masks: Tensor
    phrases: tuple[str, ...] = ()

    def routing(
        self, phrases: Sequence[str], order: Sequence[Site], acting: frozenset[Site], window: Window
    ) -> Routing:
        return MaskRouting(acting, window, _names(phrases), masks=self._of(phrases))

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
    _routes: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)

    def begin(self) -> MaskRouting:
        return replace(self, _last=[], _routes={})

    def _find(self, call: AttentionCall) -> Tensor:
        chunk = call.chunk
        place = (call.grid, chunk.area, chunk.latent)
        if place not in self._routes:
            cover = torch.cat([region_at(mask[None], chunk, call.grid, 1) for mask in self.masks.float()])
            self._routes[place] = route_of_cover(cover)
        return self._routes[place]


# By cross-attention maps


@dataclass(frozen=True)
class MapRouter:
    """Routes by the cross-attention maps of the subjects' phrases: blurred by `smoothing` (a share of the shorter
    side), stretched to 0 to 1, background where none is above `threshold`.

    A layer's maps are those of the cross-attention before it, as in the paper, or with `running_mean` the mean over all
    cross-attentions of the run so far."""

    threshold: float = 0.4
    smoothing: float = 0.05
    running_mean: bool = False

    def routing(
        self, phrases: Sequence[str], order: Sequence[Site], acting: frozenset[Site], window: Window
    ) -> Routing:
        for number, phrase in enumerate(phrases, 1):
            if not phrase:
                raise ValueError(
                    f"Subject {number} has no phrase, so its attention map cannot be found; give its Subject node one."
                )
        before: dict[Site, Site] = {}
        last = None
        for site in order:
            if site.kind == "cross":
                last = site
            if last is not None:
                before[site] = last
        if self.running_mean:
            # What earlier steps say counts too.
            window, read = Window(0.0, window.end_percent), {site for site in order if site.kind == "cross"}
        else:
            read = {before[site] for site in acting if site in before}
        sites, names = frozenset(acting | read), _names(phrases)
        return MapRouting(
            sites, window, names, router=self, phrases=tuple(phrases), before=before, read=frozenset(read)
        )


@dataclass
class _Mean:
    """The mean of what it is told, a map of one shape."""

    value: Tensor
    count: int = 1

    def add(self, value: Tensor) -> None:
        self.count += 1
        self.value += (value - self.value) / self.count


@dataclass(frozen=True, eq=False, kw_only=True)
class MapRouting(Routing):
    """Reads the maps of each conditioning's own chunks at `read`; `before` gives the cross-attention before a site (a
    cross-attention's is itself)."""

    router: MapRouter
    phrases: tuple[str, ...]
    before: Mapping[Site, Site]
    read: frozenset[Site]
    _maps: dict[Hashable, tuple[float, Tensor]] = field(default_factory=dict, repr=False)
    _means: dict[Hashable, _Mean] = field(default_factory=dict, repr=False)
    _sigma: list[float] = field(default_factory=lambda: [float("nan")], repr=False)

    def begin(self) -> MapRouting:
        return replace(self, _last=[], _maps={}, _means={}, _sigma=[float("nan")])

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError when no prompt of the run knows the subjects' phrases, each in a place of its own."""
        known = [prompt.get(SPANS_KEY, {}) for prompt in prompts]
        if any(all(tokens_in_turn(spans, self.phrases)) for spans in known):
            return
        spans = max(known, key=lambda spans: sum(map(bool, tokens_in_turn(spans, self.phrases))), default={})
        found = tokens_in_turn(spans, self.phrases)
        missing = next(phrase for phrase, tokens in zip(self.phrases, found, strict=True) if not tokens)
        if self.phrases.count(missing) > 1:
            raise ValueError(
                f"{self.phrases.count(missing)} subjects have the phrase '{missing}', which the positive prompt does "
                "not say that often; name each subject in it, in their order, and encode it with Encode Prompt with "
                "Subjects."
            )
        raise ValueError(
            f"The positive conditioning does not say which of its words are '{missing}', so this subject's attention "
            f"map cannot be found; make it with Encode Prompt with Subjects, with '{missing}' among its phrases."
        )

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        self._sigma[0] = sigma
        super().amend(call, sigma, recorded)

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if call.site not in self.read:
            return
        tokens = tokens_in_turn(call.chunk.conditioning.get(SPANS_KEY, {}), self.phrases)
        maps = attention_maps(call, tokens) if any(tokens) else None
        if maps is None:
            return
        maps = normalised(smoothed(maps, self.router.smoothing))
        key = _key(call)
        if not self.router.running_mean:
            self._maps[key, call.site] = (sigma, maps)
            return
        maps = resized(maps, call.chunk.area[:2] if call.chunk.area else call.chunk.latent)
        if key in self._means and self._means[key].value.shape == maps.shape:
            self._means[key].add(maps)
        else:
            self._means[key] = _Mean(maps)

    def _find(self, call: AttentionCall) -> Tensor | None:
        key = _key(call)
        if self.router.running_mean:
            mean = self._means.get(key)
            maps = None if mean is None else normalised(mean.value)
        else:
            # Nothing of an earlier step, where another pack skipped the layer in this one.
            kept, maps = self._maps.get((key, self.before.get(call.site)), (None, None))
            maps = maps if kept == self._sigma[0] else None
        if maps is None or len(maps) != len(call.query):
            return None
        return route_of_maps(resized(maps, call.grid), self.router.threshold).cpu()


def tokens_in_turn(spans: Mapping[str, Spans], phrases: Sequence[str]) -> list[list[int]]:
    """The tokens of each phrase in a prompt. Where several subjects share a phrase, they take its occurrences in turn,
    one each; a subject that finds none has no tokens."""
    known = {canonical(phrase): found for phrase, found in spans.items()}
    wanted = [canonical(phrase) for phrase in phrases]
    tokens = []
    for number, name in enumerate(wanted):
        places = known.get(name, ())
        if wanted.count(name) > 1:
            turn = wanted[:number].count(name)
            places = places[turn : turn + 1]
        tokens.append([token for start, stop in places for token in range(start, stop)])
    return tokens


def _key(call: AttentionCall) -> Hashable:
    return (call.chunk.conditioning.get("uuid"), call.chunk.name, call.chunk.area)


def _names(phrases: Sequence[str]) -> tuple[str, ...]:
    return tuple(phrase or f"subject {number}" for number, phrase in enumerate(phrases, 1))
