"""Chunk: one conditioning's share of a call of the model, and which part of which pictures it shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..parts.prompt import SPANS_KEY, Spans
from ..parts.rows import in_turn
from .placing import Lines, cut

if TYPE_CHECKING:
    from .streams import Stream

# The name of a chunk that is the pass of a branch beside the generation.
BRANCH = "branch"


@dataclass(frozen=True)
class Chunk:
    """One conditioning's share of a batch: `rows` of it, the conditioning's dictionary as the sampler holds it, the
    name of the guider's list it stands in ("positive", ...; "" where it is unknown) and whether that list conditions on
    a prompt. The pass of a branch that denoises beside the generation is one chunk of the name BRANCH, and `stream` is
    the branch.

    `before` is how many tokens the model puts before the conditioning's own in the context that it makes of it, and
    `again` (first, by) which of them it has there twice, a second tensor's: see `Family.again`.
    `area` is (height, width, y, x) in latent pixels where the host cropped the latent, else None; `latent` is the
    whole latent's (height, width). Where another pack calls the model on part of the picture, a tile, that has its area
    too, or its `lines` where these do not follow each other; `pictures` are then the numbers of its rows in the run's
    batch of `count`. Without `known_places` nothing
    is known of where it lies. Where another pack changed a cross-attention's keys, `keys` are those that are the
    prompt's, and `picked` says which token each of them is, where these are not all in turn."""

    rows: slice
    name: str
    conditioned: bool
    conditioning: dict[str, Any]
    latent: tuple[int, int]
    area: tuple[int, int, int, int] | None = None
    stream: Stream | None = None
    before: int = 0
    again: tuple[int, int] = (0, 0)
    lines: Lines | None = None
    pictures: tuple[int, ...] | None = None
    count: int = 0
    known_places: bool = True
    keys: slice | None = None
    picked: tuple[int, ...] | None = None

    @property
    def part(self) -> tuple[Any, ...]:
        """Which part of which pictures it is, as a key."""
        return (self.area, self.lines, self.pictures)

    @property
    def is_tile(self) -> bool:
        """Whether another pack cut it out of the picture."""
        return self.pictures is not None and (self.area is not None or self.lines is not None)

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of its own latents."""
        if self.lines is not None:
            return len(self.lines[0]), len(self.lines[1])
        return self.latent if self.area is None else self.area[:2]

    def cut(self, whole: Tensor) -> Tensor:
        """What of the whole picture's latent pixels (..., height, width) it shows: (..., *size)."""
        if self.lines is not None:
            return cut(whole, self.lines)
        if self.area is None:
            return whole
        height, width, y, x = self.area
        return whole[..., y : y + height, x : x + width]

    def lent(self, things: Tensor, rows: int) -> Tensor:
        """Of things (count, ...) that go with the batch's pictures in turn, those of its rows: (rows, ...)."""
        if self.pictures is None or len(things) == 1:
            return in_turn(things, rows)
        return things[[picture % len(things) for picture in self.pictures]]

    @cached_property
    def spans(self) -> dict[str, Spans]:
        """Where in the model's context the phrases are that the conditioning knows, found once for all of a call."""
        return {phrase: self.placed(found) for phrase, found in self.conditioning.get(SPANS_KEY, {}).items()}

    def placed(self, spans: Spans) -> Spans:
        """Spans of the conditioning's tokens as spans of the model's context, or of what of it another pack picked."""
        first, by = self.again
        twice = [(start + by, stop + by) for start, stop in spans if by and start >= first]
        moved = tuple((start + self.before, stop + self.before) for start, stop in (*spans, *twice))
        if self.picked is None:
            return moved
        wanted = {position for start, stop in moved for position in range(start, stop)}
        return tuple((place, place + 1) for place, token in enumerate(self.picked) if token in wanted)

    @property
    def length(self) -> int:
        """How many tokens the model's context has before the host repeats it, or how many of it another pack picked."""
        if self.picked is not None:
            return len(self.picked)
        return self.conditioning["model_conds"]["c_crossattn"].cond.shape[1] + 2 * self.again[1]

    @property
    def generated(self) -> bool:
        """Whether it is known to be one of the generation's."""
        return self.name not in ("", BRANCH)
