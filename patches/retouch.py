"""The retouch stage of Layout-and-Retouch (section 3.2.2): the target's attention takes over what two finished pictures
lend, structure from the layout's path and looks from the reference's.

Both paths are inversions that were kept whole, so they are run beside the target without drift. The algorithm counts
its steps down from T; its text and appendix mean the early ones by those up to lambda2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from .blend_mask import AdaptiveMask, Gathering, MaskInRun
from .call import AttentionCall, Chunk
from .edit import Edit, Request
from .region import region_at, tokens_at
from .sites import Site
from .streams import UNCONDITIONAL, Features, Stream, Trajectory
from .window import Window

# Equations


class Attended(NamedTuple):
    """Query, key and value of one attention, each (rows, tokens, channels)."""

    query: Tensor
    key: Tensor
    value: Tensor


def swapped_early(target: Attended, layout: Attended) -> Attended:
    """Algorithm 1, line 10: in the first lambda2 steps all three are the layout's, in self- and cross-attention."""
    return Attended(*(per_row(tensor, len(target.query)) for tensor in layout))


def swapped_late(target: Attended, reference: Attended) -> Attended:
    """Algorithm 1, line 12: afterwards self-attention keeps the target's query and takes the reference's key and value
    (mutual self-attention)."""
    rows = len(target.query)
    return Attended(target.query, per_row(reference.key, rows), per_row(reference.value, rows))


def blended(target: Tensor, layout: Tensor, mask: Tensor) -> Tensor:
    """The last equation of section 3.2.2: M * phi_t + (1 - M) * phi_o of a self-attention's outputs (rows, places,
    channels), with M (rows or 1, places)."""
    mask = mask.to(target)[..., None]
    return mask * target + (1 - mask) * layout


def per_row(lent: Tensor, rows: int) -> Tensor:
    """Features of a path (1 or n, ...) for the rows of a batch: one path serves all, of several each its row, the last
    one repeated."""
    if len(lent) == 1:
        return lent.expand(rows, *lent.shape[1:])
    return lent[[min(row, len(lent) - 1) for row in range(rows)]]


# The edits


@dataclass(frozen=True, eq=False)
class Path:
    """A finished picture's path, run with the conditioned chunks' prompt and, where those swap too, with the
    generation's negative one for the unconditioned chunks."""

    conditioned: Trajectory
    unconditioned: Trajectory | None

    @property
    def streams(self) -> tuple[Trajectory, ...]:
        return (self.conditioned,) if self.unconditioned is None else (self.conditioned, self.unconditioned)

    def beside(self, chunk: Chunk) -> Trajectory | None:
        """The stream that lends to a chunk."""
        if not chunk.generated:
            return None
        return self.conditioned if chunk.conditioned else self.unconditioned


def path_of(trajectory: Trajectory, conditioning: Any, both: bool) -> Path:
    """A path with a conditioning of its own, None for the generation's; `both` lends to unconditioned chunks too."""
    unconditioned = replace(trajectory, conditioning=UNCONDITIONAL) if both else None
    return Path(replace(trajectory, conditioning=conditioning), unconditioned)


@dataclass(frozen=True, eq=False)
class _Lent(Edit):
    """What the parts of the swap share: a path, and which chunks it lends to."""

    path: Path
    wanted: tuple[str, ...]

    def requests(self, sigma: float) -> Iterable[Request]:
        return [(stream, self.sites, self.wanted) for stream in self.path.streams]

    def wants(self, chunk: Chunk) -> bool:
        return self.path.beside(chunk) is not None

    def placed(self, lent: Tensor, call: AttentionCall) -> Tensor | None:
        """The path's features with places (rows, height, width, channels) at those of a call: (rows, queries,
        channels). Where area conditioning crops the generation, the same part. None where another pack merged places.

        Raises ValueError when the path's picture has another size than the generation's."""
        size, latent = tuple(self.path.conditioned.shape[-2:]), call.chunk.latent
        if size != latent:
            raise ValueError(
                f"The layout trajectory is of a picture of {size[1]} x {size[0]} latent pixels but this one has "
                f"{latent[1]} x {latent[0]}; sample at the layout's size, best from its last latent."
            )
        return None if call.grid is None or lent.ndim != 4 else tokens_at(lent, call)


@dataclass(frozen=True, eq=False)
class LayoutSwap(_Lent):
    """Query, key and value from the layout."""

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        lent = recorded(self.path.beside(call.chunk))
        query = None if lent is None else self.placed(lent["query"], call)
        if query is not None:
            layout = Attended(query, lent["key"], lent["value"])
            call.replace(*swapped_early(Attended(call.query, call.key, call.value), layout))


@dataclass(frozen=True, eq=False)
class ReferenceSwap(_Lent):
    """Key and value from the reference. Where an earlier node swapped them already, the target attends to both."""

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        lent = recorded(self.path.beside(call.chunk))
        # A layout's query keeps the layout's keys: at the noise level where the phases meet, or another node's.
        if lent is None or "query" in call.replaced:
            return
        own = Attended(call.query, call.key, call.value)
        given = swapped_late(own, Attended(call.query, lent["key"], lent["value"]))
        if "key" in call.replaced:
            call.extend(given.key, given.value)
        else:
            call.replace(key=given.key, value=given.value)


@dataclass(frozen=True, eq=False)
class LayoutBlend(_Lent):
    """Blends self-attention's output with the layout's, by a mask (1 or batch, height, width) of 0 to 1 in which 1 is
    the target's, or by one that is made while sampling."""

    mask: Tensor | MaskInRun

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        lent = recorded(self.path.beside(call.chunk))
        layout = None if lent is None else self.placed(lent["output"], call)
        if layout is None:
            return
        rows = len(call.query)
        mask = self.mask
        if isinstance(mask, MaskInRun):
            stages = mask.stages(sigma, call.chunk.latent)
            if stages is None:
                return
            stages.note(call)
            mask = stages.blend
        here = region_at(mask, call.chunk, call.grid, rows)
        call.note("blend mask", lambda: here.unflatten(-1, call.grid))
        here = here.to(call.query.device)
        call.blend(lambda output: blended(output, per_row(layout, rows), here))


@dataclass(frozen=True, eq=False)
class MultiSourceSwap(Edit):
    """Algorithm 1. `sites` are self-attention layers; `crossing` are the cross-attention layers that take the layout's
    query, key and value with them in the first phase.

    `layout` lends until `switch` (lambda2) and `reference` afterwards, both shares of the schedule; from `blend_from`
    on the output is blended by `mask`. Each of layout, reference and mask may be None: the paper's ablations. `watched`
    are the cross-attention layers whose maps an adaptive mask is made of."""

    layout: Path | None
    reference: Path | None
    switch: float = 0.2
    blend_from: float = 0.6
    mask: Tensor | AdaptiveMask | None = None
    crossing: frozenset[Site] = frozenset()
    watched: frozenset[Site] = frozenset()

    def check(self, prompts: Sequence[Any]) -> None:
        """Raises ValueError when an adaptive mask's phrase is known to none of the run's prompts."""
        if isinstance(self.mask, AdaptiveMask):
            self.mask.check(prompts)

    def parts(self) -> Iterable[Edit]:
        early = self._window(0.0, self.switch)
        late = self._window(self.switch, 1.0)
        if self.layout is not None:
            yield LayoutSwap(self.sites | self.crossing, early, self.layout, ("query", "key", "value"))
        if self.reference is not None:
            yield ReferenceSwap(self.sites, late, self.reference, ("key", "value"))
        if self.layout is None or self.mask is None:
            return
        mask = self.mask
        if isinstance(mask, AdaptiveMask):
            mask = MaskInRun(mask)
            yield Gathering(self.watched, late, mask)
        yield LayoutBlend(self.sites, self._window(self.blend_from, 1.0), self.layout, ("output",), mask)

    def _window(self, start: float, end: float) -> Window:
        """The part of this edit's own window from `start` to `end`."""
        least, most = self.window.start_percent, self.window.end_percent
        return Window(min(max(start, least), most), min(max(end, least), most))
