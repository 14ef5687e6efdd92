"""The retouch stage of Layout-and-Retouch (section 3.2.2): the target's attention takes over what two finished pictures
lend, structure from the layout's path and looks from the reference's.

Both paths are inversions that were kept whole, so they are run beside the target without drift. The algorithm counts
its steps down from T; its text and appendix mean the early ones by those up to lambda2.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.chunk import Chunk
from ..engine.edit import Edit, Request, Start
from ..engine.streams import UNCONDITIONAL, Features, Stream, Trajectory, check_level
from ..parts.masks import lending
from ..parts.rows import check_rows, in_turn, matching_rows, rows_in_turn
from ..parts.sites import Site
from ..parts.window import Window
from .blend_mask import AdaptiveMask, Gathering, MaskInRun
from .region import Regions, tokens_at

# Equations


class Attended(NamedTuple):
    """Query, key and value of one attention, each (rows, tokens, channels)."""

    query: Tensor
    key: Tensor
    value: Tensor


def swapped_early(target: Attended, layout: Attended) -> Attended:
    """Algorithm 1, line 10: in the first lambda2 steps all three are the layout's, in self- and cross-attention."""
    return Attended(*(in_turn(tensor, len(target.query)) for tensor in layout))


def swapped_late(target: Attended, reference: Attended) -> Attended:
    """Algorithm 1, line 12: afterwards self-attention keeps the target's query and takes the reference's key and value
    (mutual self-attention)."""
    rows = len(target.query)
    return Attended(target.query, in_turn(reference.key, rows), in_turn(reference.value, rows))


def blended(target: Tensor, layout: Tensor, mask: Tensor) -> Tensor:
    """The last equation of section 3.2.2: M * phi_t + (1 - M) * phi_o of a self-attention's outputs (rows, places,
    channels), with M (rows or 1, places)."""
    mask = mask.to(target)[..., None]
    return mask * target + (1 - mask) * layout


# The edits


@dataclass(frozen=True, eq=False)
class Path:
    """A finished picture's path, run with the conditioned chunks' prompt and, where those swap too, with the
    generation's negative one for the unconditioned chunks. Of several pictures, `rows` says for each row of the run's
    batch which one lends to it; without it they take turns. Of a reference only what lies inside `mask` (1 or pictures,
    height, width) lends."""

    conditioned: Trajectory
    unconditioned: Trajectory | None
    rows: tuple[int, ...] = ()
    mask: Tensor | None = None

    @property
    def count(self) -> int:
        """How many pictures it has."""
        return self.conditioned.shape[0]

    def of_rows(self, lent: Tensor) -> Tensor:
        """What it lent (pictures, ...), for each row of the run's batch what its own picture did."""
        return lent if len(lent) == 1 or not self.rows else lent[list(self.rows)]

    @property
    def streams(self) -> tuple[Trajectory, ...]:
        return (self.conditioned,) if self.unconditioned is None else (self.conditioned, self.unconditioned)

    def beside(self, chunk: Chunk) -> Trajectory | None:
        """The stream that lends to a chunk."""
        if not chunk.generated:
            return None
        return self.conditioned if chunk.conditioned else self.unconditioned


def path_of(trajectory: Trajectory, conditioning: Any, both: bool, mask: Tensor | None = None) -> Path:
    """A path with a conditioning of its own, None for the generation's; `both` lends to unconditioned chunks too. Of a
    reference only what lies inside `mask` lends; see `Path`."""
    unconditioned = replace(trajectory, conditioning=UNCONDITIONAL) if both else None
    return Path(replace(trajectory, conditioning=conditioning), unconditioned, mask=mask)


@dataclass(frozen=True, eq=False)
class _Lent(Edit):
    """What the parts of the swap share: a path, and which chunks it lends to."""

    path: Path
    wanted: tuple[str, ...]

    def requests(self, sigma: float) -> Iterable[Request]:
        return [(stream, self.sites, self.wanted) for stream in self.path.streams]

    def wants(self, chunk: Chunk) -> bool:
        return self.path.beside(chunk) is not None

    def of_rows(self, lent: Tensor, call: AttentionCall) -> Tensor:
        """What the path lent (pictures, ...), for the rows of a call."""
        return call.chunk.lent(self.path.of_rows(lent), len(call.query))

    def placed(self, lent: Tensor, call: AttentionCall) -> Tensor | None:
        """The path's features with places (rows, height, width, channels) at those of a call: (rows, queries,
        channels), stretched where a sampler has changed the generation's size since it began. Where area conditioning
        or a tile crops the generation, the same part. None where another pack merged places."""
        if call.grid is None or lent.ndim != 4:
            call.leave(self.node)
            return None
        return tokens_at(lent, call)


@dataclass(frozen=True, eq=False)
class LayoutSwap(_Lent):
    """Query, key and value from the layout."""

    node: ClassVar[str] = "Multi-Source Attention Swap (the layout, up to lambda2)"

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        lent = recorded(self.path.beside(call.chunk))
        query = None if lent is None else self.placed(lent["query"], call)
        if query is not None:
            parts = (query, _tokens(lent["key"]), _tokens(lent["value"]))
            layout = Attended(*(self.of_rows(part, call) for part in parts))
            call.replace(*swapped_early(Attended(call.query, call.key, call.value), layout))


@dataclass(frozen=True, eq=False)
class ReferenceSwap(_Lent):
    """Key and value from the reference, of which only the tokens inside its mask lend. Where an earlier node swapped
    them already, the target attends to both; with `extends` it attends to its own, too, which no paper does."""

    node: ClassVar[str] = "Multi-Source Attention Swap (the reference, from lambda2 on)"

    extends: bool
    # What lends at a layer's grid is the same at every step of the run.
    insides: dict[Hashable, tuple[Tensor, Tensor | None]]

    def _inside(self, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """`lending` at the places of a layer's keys (pictures, height, width, channels), on their device."""
        grid = tuple(key.shape[1:3])
        place = (grid, key.device, key.dtype)
        if place not in self.insides:
            inside, bias = lending(self.path.mask, grid)
            self.insides[place] = inside.to(key.device), None if bias is None else bias.to(key)
        return self.insides[place]

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        lent = recorded(self.path.beside(call.chunk))
        # A layout's query keeps the layout's keys: at the noise level where the phases meet, or another node's.
        if lent is None or "query" in call.replaced:
            return
        key, value, bias = lent["key"], lent["value"], None
        if self.path.mask is not None:
            if key.ndim != 4:
                call.leave(self.node)
                return
            inside, bias = self._inside(key)
            key, value = (_tokens(part).index_select(1, inside) for part in (key, value))
            bias = None if bias is None else in_turn(self.of_rows(bias, call), len(call.query))
        own = Attended(call.query, call.key, call.value)
        lent_key, lent_value = (self.of_rows(_tokens(part), call) for part in (key, value))
        given = swapped_late(own, Attended(call.query, lent_key, lent_value))
        if self.extends or "key" in call.replaced:
            call.extend(given.key, given.value, bias)
            return
        call.replace(key=given.key, value=given.value)
        if bias is not None:
            call.bias(bias, call.own)


def _tokens(features: Tensor) -> Tensor:
    """Features with or without places as (rows, tokens, channels)."""
    return features.flatten(1, -2)


@dataclass(frozen=True, eq=False)
class LayoutBlend(_Lent):
    """Blends self-attention's output with the layout's, by a mask (1 or batch, height, width) of 0 to 1 in which 1 is
    the target's, or by one that is made while sampling."""

    node: ClassVar[str] = "Multi-Source Attention Swap (the blend mask, from mask_blend_start on)"

    mask: Tensor | MaskInRun
    regions: Regions

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        lent = recorded(self.path.beside(call.chunk))
        layout = None if lent is None else self.placed(lent["output"], call)
        if layout is None:
            return
        rows, layout = len(call.query), self.of_rows(layout, call)
        mask = self.mask
        if isinstance(mask, MaskInRun):
            stages = mask.stages(sigma, call.chunk.latent)
            if stages is None:
                return
            stages.note(call)
            mask = stages.blend
        here = self.regions.at(mask, call, call.query.device)
        call.note("blend mask", lambda: here.unflatten(-1, call.grid))
        call.blend(lambda output: blended(output, in_turn(layout, rows), here))


@dataclass(frozen=True, eq=False)
class MultiSourceSwap(Edit):
    """Algorithm 1. `sites` are self-attention layers; `crossing` are the cross-attention layers that take the layout's
    query, key and value with them in the first phase.

    `layout` lends until `switch` (lambda2) and `reference` afterwards, both shares of the schedule; from `blend_from`
    on the output is blended by `mask`. With `extends` the reference's keys and values stand beside the target's own
    instead of in their place. Each of layout, reference and mask may be None: the paper's ablations. `watched`
    are the cross-attention layers whose maps an adaptive mask is made of."""

    layout: Path | None
    reference: Path | None
    switch: float = 0.2
    blend_from: float = 0.6
    mask: Tensor | AdaptiveMask | None = None
    crossing: frozenset[Site] = frozenset()
    watched: frozenset[Site] = frozenset()
    extends: bool = False
    _paths: dict[str, Path] = field(default_factory=dict, init=False, repr=False)

    def start(self, start: Start) -> None:
        """Finds which picture of a trajectory of several goes with which row of the batch. Raises ValueError when there
        are more pictures than rows, the layout's picture has another size than the generation's, or a trajectory does
        not reach a noise level at which it must lend."""
        if self.layout is not None:
            size, latent = (tuple(each.shape[-2:]) for each in (self.layout.conditioned.states, start.noise))
            if size != latent:
                raise ValueError(
                    f"The layout trajectory is of a picture of {size[1]} x {size[0]} latent pixels but this one has "
                    f"{latent[1]} x {latent[0]}; sample at the layout's size, best from its last latent."
                )
        mask = self.mask.segmented if isinstance(self.mask, AdaptiveMask) else self.mask
        if mask is not None:
            check_rows("blend masks", len(mask), len(start.latents))
        matched: tuple[int, list[int]] | None = None
        for name, path in (("layout", self.layout), ("reference", self.reference)):
            if path is None:
                continue
            self._check_levels(name, path, start)
            states = path.conditioned.states
            rows = matching_rows((states[0], states[-1]), start.latents) if path.count > 1 else None
            if rows is not None:
                matched = (path.count, rows)
            elif path.count > 1 and matched is not None and matched[0] == path.count:
                # Inverted together, layout and reference belong together.
                rows = matched[1]
            else:
                check_rows(f"pictures in the {name} trajectory", path.count, len(start.latents))
                rows = rows_in_turn(path.count, len(start.latents))
            self._paths[name] = replace(path, rows=tuple(rows))

    def _check_levels(self, name: str, path: Path, start: Start) -> None:
        windows = [part.window for part in self.parts() if isinstance(part, _Lent) and part.path is path]
        kept = path.conditioned.sigmas
        # The model is not asked at the last one, where the picture is.
        for sigma in start.levels.sigmas[:-1]:
            if any(start.levels.lie_in(window, sigma) for window in windows):
                check_level(f"The {name} trajectory", kept, sigma)

    def check(self, prompts: Sequence[Any]) -> None:
        """Raises ValueError when an adaptive mask's phrase is known to none of the run's prompts."""
        if isinstance(self.mask, AdaptiveMask):
            self.mask.check(prompts)

    def parts(self) -> Iterable[Edit]:
        early = self._window(0.0, self.switch)
        late = self._window(self.switch, 1.0)
        layout, reference = self._paths.get("layout", self.layout), self._paths.get("reference", self.reference)
        if layout is not None:
            yield LayoutSwap(self.sites | self.crossing, early, layout, ("query", "key", "value"))
        if reference is not None:
            yield ReferenceSwap(self.sites, late, reference, ("key", "value"), self.extends, {})
        if layout is None or self.mask is None:
            return
        mask = self.mask
        if isinstance(mask, AdaptiveMask):
            mask = MaskInRun(mask)
            yield Gathering(self.watched, late, mask)
        yield LayoutBlend(self.sites, self._window(self.blend_from, 1.0), layout, ("output",), mask, Regions())

    def _window(self, start: float, end: float) -> Window:
        """The part of this edit's own window from `start` to `end`. A run without noise of its own goes on from a
        latent of the kept path, and is of that path's schedule."""
        least, most = self.window.start_percent, self.window.end_percent
        path = self.layout or self.reference
        return Window(min(max(start, least), most), min(max(end, least), most), float(path.conditioned.sigmas[0]))
