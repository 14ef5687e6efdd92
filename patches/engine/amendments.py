"""What edits put into an attention call, keys beside its own and functions of its output, and what they tell of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Extension:
    """Keys and values (rows or 1, n, channels) that a call attends over besides its own.

    `bias` is added to their logits, broadcastable to (rows, queries, n). `route`, of shape (rows or 1, queries), says
    which queries see them at all; None is every query. A route is best on the CPU, where it can be looked at without
    waiting for a GPU."""

    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    route: Tensor | None = None


@dataclass(frozen=True)
class Note:
    """What an edit decided at a call, for whoever looks inside: `make` gives maps over the call's places, float,
    (rows or 1, height, width) or (rows or 1, k, height, width); `labels` says what each of the k is, where that is
    known."""

    name: str
    make: Callable[[], Tensor]
    labels: tuple[str, ...] = ()

    def maps(self) -> Tensor:
        """The maps, made now: (rows or 1, k, height, width) in float32."""
        made = self.make().detach().float()
        made = made if made.ndim == 4 else made[:, None]
        if made.ndim != 4 or len(self.labels) not in (0, made.shape[1]):
            raise ValueError(
                f"The note '{self.name}' made a tensor of shape {tuple(made.shape)} for {len(self.labels)} labels."
            )
        return made


@dataclass(frozen=True)
class Blend:
    """A function of a call's output, or `of_prompt` of the part of it that the prompt's keys give."""

    function: Callable[[Tensor], Tensor]
    of_prompt: bool = False
