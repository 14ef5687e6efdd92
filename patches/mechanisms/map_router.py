"""Routes by cross-attention maps: the phrase that a place attends to most takes it, if that is enough."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.streams import Features, Stream
from ..parts.prompt import SPANS_KEY, Spans, canonical, positions_of
from ..parts.sites import Site, acts_as
from ..parts.window import Window
from .attention_maps import MeanMap, attention_maps, normalised, resized, smoothed, spread_out
from .router import Route, Routing, names_of, preceding
from .subject import Subject


def route_of_maps(maps: Tensor, threshold: float) -> Tensor:
    """The subject whose map is highest at each place, or the background where none is above `threshold`: maps (rows, n,
    height, width) of 0 to 1 to (rows, places) of 0 to n, n being the background."""
    most, subject = maps.flatten(2).max(1)
    return torch.where(most > threshold, subject, maps.shape[1])


@dataclass(frozen=True)
class MapRouter:
    """Routes by the cross-attention maps of the subjects' phrases: blurred by `smoothing` (a share of the shorter
    side), stretched to 0 to 1, background where none is above `threshold`.

    A layer's maps are with `running_mean` the mean over all cross-attentions of the run so far, else those of the
    cross-attention before it, as in the paper."""

    threshold: float = 0.4
    smoothing: float = 0.05
    running_mean: bool = True

    models: ClassVar[tuple[Any, ...]] = ()

    def routing(
        self, subjects: Sequence[Subject], order: Sequence[Site], acting: frozenset[Site], window: Window
    ) -> MapRouting:
        phrases = [subject.phrase for subject in subjects]
        for number, phrase in enumerate(phrases, 1):
            if not phrase:
                raise ValueError(
                    f"Subject {number} has no phrase, so its attention map cannot be found; give its Subject Reference "
                    "node one."
                )
        before = preceding(order)
        if self.running_mean:
            # What earlier steps say counts too.
            window, read = Window(0.0, window.end_percent), {site for site in order if acts_as(site, "cross")}
        else:
            read = {before[site] for site in acting if site in before}
        sites, names = frozenset(acting | read), names_of(subjects)
        return MapRouting(
            sites, window, names, router=self, phrases=tuple(phrases), before=before, read=frozenset(read)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class MapRouting(Routing):
    """Reads the maps of each conditioning's own chunks at `read`; `before` gives the cross-attention before a site (a
    cross-attention's is itself, a joint attention's is the joint attention before it)."""

    router: MapRouter
    phrases: tuple[str, ...]
    before: Mapping[Site, Site]
    read: frozenset[Site]
    _maps: dict[Hashable, tuple[float, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _means: dict[Hashable, MeanMap] = field(default_factory=dict, init=False, repr=False)
    _tokens: dict[Hashable, list[list[int]]] = field(default_factory=dict, init=False, repr=False)
    _canvases: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)
    _sigma: list[float] = field(default_factory=lambda: [float("nan")], init=False, repr=False)

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
        if sigma != self._sigma[0]:
            self._sigma[0] = sigma
            if not self.router.running_mean:
                # Nothing of an earlier step: a run has too many for all of its layers' maps.
                self._canvases.clear()
        super().amend(call, sigma, recorded)

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if call.site not in self.read or not call.chunk.spans:
            return
        key = _key(call)
        if key not in self._tokens:
            self._tokens[key] = tokens_in_turn(call.chunk.spans, self.phrases)
        tokens = self._tokens[key]
        maps = attention_maps(call, tokens) if any(tokens) else None
        if maps is None:
            if any(tokens) and (call.grid is None or call.prompt is None):
                call.leave("Route Subjects by Attention")
            return
        maps = smoothed(maps, self.router.smoothing)
        if call.chunk.is_tile:
            self._gather(key, call, maps)
            return
        maps = normalised(maps)
        if not self.router.running_mean:
            self._maps[key, call.site] = (sigma, maps)
            return
        maps = resized(maps, call.chunk.size)
        if key in self._means and len(self._means[key].value) == len(maps):
            self._means[key].add(maps)
        else:
            self._means[key] = MeanMap(maps)

    def knows_all(self, call: AttentionCall) -> bool:
        """Whether a call's prompt has every subject's phrase, each in a place of its own."""
        return all(tokens_in_turn(call.chunk.spans, self.phrases))

    def _gather(self, key: Hashable, call: AttentionCall, maps: Tensor) -> None:
        """Adds a tile's maps to those of the whole picture: stretched alone, a tile would show some of everything."""
        maps = resized(maps, call.chunk.size)
        both = spread_out(torch.cat([maps, maps.new_ones((len(maps), 1, *call.chunk.size))], 1), call.chunk)
        place = key if self.router.running_mean else (key, call.site)
        known = self._canvases.get(place)
        self._canvases[place] = both if known is None or known.shape != both.shape else known + both

    def _of_canvas(self, key: Hashable, call: AttentionCall) -> Tensor | None:
        """A tile's part of the maps of the whole picture, as far as these are known."""
        mean = self.router.running_mean
        both = self._canvases.get(key if mean else (key, self.before.get(call.site)))
        if both is None or tuple(both.shape[-2:]) != call.chunk.latent:
            return None
        cover = both[:, -1:]
        maps = both[:, :-1] / cover.clamp(min=1)
        # What is not known yet must not count in the smallest and largest.
        low = maps.masked_fill(cover == 0, torch.inf).amin((-2, -1), keepdim=True)
        maps = normalised(torch.where(cover == 0, low.clamp(max=torch.finfo(maps.dtype).max), maps))
        return call.chunk.cut(maps[list(call.chunk.pictures)])

    def _find(self, call: AttentionCall) -> Route | None:
        key = _key(call)
        if call.chunk.is_tile:
            maps = self._of_canvas(key, call)
        elif self.router.running_mean:
            mean = self._means.get(key)
            maps = None if mean is None else normalised(mean.value)
        else:
            # Nothing of an earlier step, where another pack skipped the layer in this one.
            kept, maps = self._maps.get((key, self.before.get(call.site)), (None, None))
            maps = maps if kept == self._sigma[0] else None
        if maps is None or len(maps) != len(call.query):
            return None
        return Route(route_of_maps(resized(maps, call.grid), self.router.threshold).cpu(), len(self.names))


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
        tokens.append(positions_of(places))
    return tokens


def _key(call: AttentionCall) -> Hashable:
    chunk = call.chunk
    return (chunk.conditioning.get("uuid"), chunk.name, None if chunk.is_tile else chunk.part)
