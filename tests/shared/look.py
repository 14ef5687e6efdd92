"""Edits that keep the attention calls of a sampling run: one that amends nothing, one that does what a test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import BRANCH, Chunk
from subject_patches.patches.engine.edit import Edit
from subject_patches.patches.engine.streams import Features, Stream
from torch import Tensor


@dataclass
class Seen:
    """One executed attention: what went in, before and after amending, whether it was, and what came out."""

    call: AttentionCall
    sigma: float
    amended: bool
    output: Tensor | None = None

    def keep(self, output: Tensor) -> Tensor:
        self.output = output.clone()
        return output


@dataclass(frozen=True, eq=False)
class Look(Edit):
    """Amends nothing; keeps every call of every chunk, but for those of a branch beside the generation."""

    seen: list[Seen] = field(default_factory=list)

    def wants(self, chunk: Chunk) -> bool:
        return chunk.name != BRANCH

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        seen = Seen(call, sigma, call.amended)
        call.blend(seen.keep)
        self.seen.append(seen)

    def of(self, name: str) -> list[Seen]:
        """The self-attentions of the chunks of one of the guider's lists."""
        return [seen for seen in self.seen if seen.call.chunk.name == name]


@dataclass(frozen=True, eq=False)
class Acting(Edit):
    """Keeps every call that it is shown, with what the `act` given made of it."""

    act: Callable[[AttentionCall], None]
    seen: list[AttentionCall] = field(default_factory=list)

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        self.act(call)
        self.seen.append(call)
