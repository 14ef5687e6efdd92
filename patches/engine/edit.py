"""What a mechanism is to the engine: an edit of attention calls inside a window of the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from ..parts.process import DIFFUSION, Process
from ..parts.sites import Site
from ..parts.window import Levels, Window
from .call import AttentionCall
from .chunk import Chunk
from .denoising import Kept
from .streams import Features, Stream

# Which features of which stream an edit needs, at which sites: ("key", "value"), say.
Request = tuple[Stream, frozenset[Site], tuple[str, ...]]


def _nothing_kept(noise: Tensor) -> Kept | None:
    return None


@dataclass(frozen=True)
class Start:
    """What a run's sampler starts from: its noise (rows, channels, height, width) in the model's latent space. `noised`
    gives what it would start from with another noise, at a noise level. `latents`, of the noise's shape, is the picture
    that the noise is added to; `mask` is where it is generated (1), broadcastable to the latents, None all over, and
    `kept` tells, for another noise, what the mask keeps; `levels` are those of the run's steps, and
    `process` says what they mean."""

    noise: Tensor
    noised: Callable[[Tensor, float], Tensor]
    latents: Tensor
    levels: Levels = field(default_factory=Levels)
    process: Process = DIFFUSION
    mask: Tensor | None = None
    kept: Callable[[Tensor], Kept | None] = _nothing_kept


@dataclass(frozen=True, eq=False)
class Edit:
    """The sites an edit acts at and its window. A mechanism overrides what it needs of the rest.

    `node` is the name of the node that the edit is of, for what is said to the person at the graph; without one nothing
    is said of it."""

    sites: frozenset[Site]
    window: Window
    node: ClassVar[str] = ""

    def begin(self) -> Edit:
        """The edit for one sampling run: a copy. What an edit keeps of a run is in fields that nobody gives
        (`init=False`), which a copy has new."""
        return replace(self)

    def parts(self) -> Iterable[Edit]:
        """What stands for the edit in a run, after `begin`: itself, or several edits that share the run's state, each
        with sites and a window of its own, in this order."""
        return (self,)

    def start(self, start: Start) -> None:
        """Told what the run starts from, once, after `begin`. Raises ValueError when the edit cannot work with it."""

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError when the edit cannot work in a run; asked once, before its first step. `prompts` are the
        dictionaries of the conditionings that condition on a prompt."""

    def requests(self, sigma: float) -> Iterable[Request]:
        """The streams to run at a noise level, and what to record of them. None by default."""
        return ()

    def keeps(self, sigma: float) -> Iterable[Request]:
        """What of streams it keeps on the model's device at a noise level: by default what it requests."""
        return self.requests(sigma)

    def brings(self) -> Iterable[Tensor]:
        """What it brings to the model's device for the run. Nothing by default."""
        return ()

    def wants(self, chunk: Chunk) -> bool:
        """Whether the edit acts on a chunk; by default on those of the generation that a prompt conditions."""
        return chunk.conditioned

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        """Amends a call at one of its sites. `recorded` gives a stream's features there, None if there are none."""

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        """Sees a call after all edits have amended it."""
