"""Layout bias (Cones 2, section 3.3): each subject's words are strengthened where the subject belongs and weakened
elsewhere, in the logits of every cross-attention.

The published code differs from the paper; this follows the code where it is one's default, and says where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.chunk import BRANCH, Chunk
from ..engine.edit import Edit, Start
from ..engine.forms import head_split
from ..engine.placing import cut
from ..engine.streams import Features, Stream
from ..parts.process import DIFFUSION, HIGHEST, Process
from ..parts.prompt import SPANS_KEY, Spans, canonical
from .layout_regions import Layout

# Beyond this a logit's share is zero in any precision; float16 ends at 65504.
HARDEST = 1e4

# Equations


def eta(sigma: float, constant: bool = False) -> float:
    """Eq. 7's concave eta(t). The paper does not give it; the code's is ln(1 + sigma^2), about 5.4 at the first step of
    SD and 0 at the end. It is never more than there: a schedule of zero terminal SNR ends in a sigma of 4519, EDM's in
    80 or 120, where it would be three times or twice as much. `constant` is 1 at every noise level, which the code's
    is at sigma 1.31. `sigma` is noise over signal: see `Process.ratio` for a flow's."""
    return 1.0 if constant else math.log1p(min(sigma, HIGHEST) ** 2)


def region_values(shown: Tensor, irrelevant: Tensor, positive: float, negative: float) -> Tensor:
    """M_s of Algorithm 1, line 2, on the canvas: `positive` (gamma+) where the subject is shown, `negative` (gamma-)
    where it is irrelevant, else 0. Masks (height, width) bool to float32; shown wins where both hold, so that a place
    in two regions is irrelevant to neither."""
    values = torch.zeros(shown.shape)
    return values.masked_fill(irrelevant, negative).masked_fill(shown, positive)


def irrelevant_to(shown: Tensor, others: Iterable[Tensor], everywhere: bool) -> Tensor:
    """Where a subject is irrelevant, (height, width) bool: by the code everywhere outside its own region, by the paper
    only in the regions of the other subjects."""
    if everywhere:
        return ~shown
    union = torch.zeros_like(shown)
    for other in others:
        union |= other
    return union & ~shown


def at_grid(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """M_s (height, width) at the (h, w) places of a layer, row by row: (h * w). Bilinear with the corners aligned.

    The two values themselves are interpolated, as in the code: with a hard `negative` a place that straddles an edge is
    almost `negative`, so regions shrink and never grow. The code has a table of four sizes and a fallback that shears
    the map; this is the table's result at those sizes and the same resampling at every other."""
    return functional.interpolate(values[None, None], grid, mode="bilinear", align_corners=True).flatten()


def logit_deviation(query: Tensor, key: Tensor, heads: int, each_row: bool = True) -> Tensor:
    """std(Q K^T / sqrt(d)), unbiased, over heads, places and tokens: (rows, 1, 1), or (1, 1, 1) over all rows too.

    The code takes it over the whole call, before the scale; taken of each row, a batch equals its singles. `query` and
    `key` are (rows, tokens, channels), or have their heads apart. Exact, in float32, without making the (heads, places,
    tokens) matrix: squares within a query's tokens sum to <Q^T Q, K'^T K'> with K' the keys less their mean, and those
    of the queries' mean logits add to them (the law of total variance)."""
    q, k = head_split(query, heads), head_split(key, heads)
    tokens, mean = k.shape[2], k.mean(2, keepdim=True)
    k = k - mean
    within = ((q.mT @ q) * (k.mT @ k)).sum((1, 2, 3), keepdim=True)
    means = q @ mean.mT
    over = (1, 2, 3) if each_row else (0, 1, 2, 3)
    squares = within if each_row else within.sum(0, keepdim=True)
    squares = squares + tokens * (means - means.mean(over, keepdim=True)).square().sum(over, keepdim=True)
    count = (means.numel() if not each_row else means[0].numel()) * tokens
    return ((squares / max(count - 1, 1)).clamp(min=0).sqrt() * q.shape[-1] ** -0.5)[:, 0]


def layout_bias(weights: Tensor, guidance: float, fade: float, deviation: Tensor) -> Tensor:
    """What Eq. 7 adds to the scaled logits: guidance * eta * std * M, (rows, places, tokens).

    `weights` is M (places, tokens), `fade` eta's value, `deviation` what `logit_deviation` gives. `guidance`, 0.05 to
    0.08 in the code, is not in the paper; the code's bias stands before the scale, with the std of the unscaled logits,
    which is the same. It multiplies the negative weight too, as in the code."""
    return weights * (guidance * fade * deviation)


# The edit


def tokens_of(spans: Mapping[str, Spans], phrases: Iterable[str]) -> dict[frozenset[str], list[int]]:
    """The tokens of a prompt that belong to some of `phrases` (as `canonical` writes them), by which of them: a token
    of "red dog" may be one of "dog" as well."""
    known = {canonical(phrase): found for phrase, found in spans.items()}
    owners: dict[int, set[str]] = {}
    for phrase in phrases:
        for start, stop in known.get(phrase, ()):
            for token in range(start, stop):
                owners.setdefault(token, set()).add(phrase)
    groups: dict[frozenset[str], list[int]] = {}
    for token, names in sorted(owners.items()):
        groups.setdefault(frozenset(names), []).append(token)
    return groups


def crop(values: Tensor, chunk: Chunk) -> Tensor:
    """The part of a canvas (height, width) that a chunk shows, which area conditioning or a tile cuts out of the
    latent, to the nearest pixel of the canvas; all of it without either."""
    if chunk.lines is not None:
        return cut(values, tuple(map(_canvas_lines, chunk.lines, values.shape, chunk.latent)))
    if chunk.area is None:
        return values
    height, width, y, x = chunk.area
    down, across = values.shape[0] / chunk.latent[0], values.shape[1] / chunk.latent[1]
    y0, x0 = min(round(y * down), values.shape[0] - 1), min(round(x * across), values.shape[1] - 1)
    y1, x1 = max(round((y + height) * down), y0 + 1), max(round((x + width) * across), x0 + 1)
    return values[y0:y1, x0:x1]


def _canvas_lines(lines: Sequence[int], side: int, latent: int) -> tuple[int, ...]:
    """The lines of a canvas, of one direction, that stand for some of the latent's."""
    scale = side / latent
    starts = [min(round(line * scale), side - 1) for line in lines]
    stops = [max(round((line + 1) * scale), start + 1) for line, start in zip(lines, starts, strict=True)]
    return tuple(n for start, stop in zip(starts, stops, strict=True) for n in range(start, min(stop, side)))


@dataclass(frozen=True, eq=False)
class LayoutBias(Edit):
    """Biases the logits of a layout's phrases, in every conditioned chunk that knows where its phrases are, and in the
    branch of Dual-Branch Integration.

    `guidance` 0 changes nothing. `negative` weakens `everywhere` outside a phrase's regions (the code) or only in those
    of other phrases (the paper). `constant` is eta's. `each_row` takes the statistic of each picture by itself."""

    node: ClassVar[str] = "Layout Bias"

    layout: Layout
    positive: float = 2.5
    negative: float = -1e8
    guidance: float = 0.08
    everywhere: bool = True
    constant: bool = False
    each_row: bool = True
    _process: list[Process] = field(default_factory=lambda: [DIFFUSION], init=False, repr=False)
    _weights: dict[Hashable, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def start(self, start: Start) -> None:
        self._process[0] = start.process

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError when a phrase of the layout is known to none of the run's prompts."""
        known = {canonical(phrase): phrase for prompt in prompts for phrase in prompt.get(SPANS_KEY, ())}
        for region in self.layout.regions:
            if canonical(region.phrase) in known:
                continue
            if not known:
                raise ValueError(
                    f"The positive conditioning does not say which of its words are '{region.phrase}'; make it with "
                    f"Encode Prompt with Subjects, with '{region.phrase}' among its phrases."
                )
            raise ValueError(
                f"The layout's phrase '{region.phrase}' is none of those that the positive conditioning knows "
                f"({', '.join(known.values())}); add it to the phrases of Encode Prompt with Subjects, or name the "
                "layout's region as it is written there."
            )

    def wants(self, chunk: Chunk) -> bool:
        """A branch beside the generation is laid out alike: what it lends would else come from other places."""
        return chunk.conditioned or chunk.name == BRANCH

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        groups = tokens_of(call.chunk.spans, self.layout.phrases)
        if not groups and call.chunk.picked is not None:
            call.leave(self.node)
        # Keys that another node put there are those of another prompt.
        if not groups or (call.prompt is not None and not call.reads):
            return
        if call.grid is None or call.prompt is None:
            call.leave(self.node)
            return
        # Where the host repeats a prompt to the length of another, the statistic is that of the prompt itself.
        length, begins = call.chunk.length, call.prompt.start
        key = call.given("key")[..., begins : begins + length, :]
        deviation = logit_deviation(call.given("query"), key, call.heads, self.each_row)
        fade = eta(self._process[0].ratio(sigma), self.constant)
        first, weights = self._weights_at(call, groups, length)
        bias = layout_bias(weights, self.guidance, fade, deviation).clamp_(-HARDEST, HARDEST)
        call.bias(bias, slice(begins + first, begins + first + weights.shape[1]))
        call.note("layout region", lambda: self._shown_at(call), self.layout.phrases)

    def _shown_at(self, call: AttentionCall) -> Tensor:
        """Where each phrase is shown, at a call's places: (1, phrases, height, width) of 0 to 1."""
        shown = self.layout.shown().values()
        maps = [at_grid(crop(mask.float(), call.chunk), call.grid).view(call.grid) for mask in shown]
        return torch.stack(maps)[None]

    def _weights_at(
        self, call: AttentionCall, groups: Mapping[frozenset[str], Sequence[int]], length: int
    ) -> tuple[int, Tensor]:
        """M for a call, of the prompt's tokens from the first to the last that belong to a phrase: the first's number,
        and (queries, tokens) float32 on the call's device. A layer's is the same at every step."""
        keys, chunk = call.prompt.stop - call.prompt.start, call.chunk
        tokens = tuple((names, tuple(found)) for names, found in groups.items())
        place = (tokens, length, keys, call.grid, chunk.part, chunk.latent, call.device)
        if place not in self._weights:
            columns = {
                names: [token + turn for turn in range(0, keys, length) for token in found] for names, found in tokens
            }
            numbers = [number for each in columns.values() for number in each]
            first = min(numbers)
            weights = torch.zeros(call.shape[1], max(numbers) + 1 - first)
            for names, found in columns.items():
                values = at_grid(crop(self._values(names), chunk), call.grid)
                weights[:, [number - first for number in found]] = values[:, None]
            self._weights[place] = first, weights.to(call.device)
        return self._weights[place]

    def _values(self, names: frozenset[str]) -> Tensor:
        shown = self.layout.shown()
        own = torch.stack([shown[name] for name in sorted(names)]).any(0)
        others = (mask for name, mask in shown.items() if name not in names)
        return region_values(own, irrelevant_to(own, others, self.everywhere), self.positive, self.negative)
