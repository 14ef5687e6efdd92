"""Which place of the picture belongs to which subject: AnyStory's routing maps.

A route gives every place to one subject or to the background (the one-hot maps of section 3.3). Where it comes from is
a router's: `mask_router.py`, `map_router.py`, `learned_router.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.edit import Edit
from ..engine.streams import Features, Stream
from ..parts.sites import Site
from ..parts.window import Window
from .subject import Subject

MOST_SUBJECTS = 8


def one_hot(route: Tensor, count: int) -> Tensor:
    """sigma(M_i) of Eq. 5 and 8: (rows, places) of 0 to `count` to (rows, count, places) of 0 and 1. The background's
    map is left out: it is the complement of the others."""
    return functional.one_hot(route, count + 1)[..., :count].mT.float()


class Route:
    """Who has each place of a call: `numbers` (1 or rows, queries) of 0 to `count` on the CPU, `count` being the
    background."""

    def __init__(self, numbers: Tensor, count: int) -> None:
        self.numbers, self.count = numbers, count

    @cached_property
    def _places(self) -> dict[int, Tensor]:
        found = self.numbers == torch.arange(self.count + 1)[:, None, None]
        return {number: found[number] for number in found.flatten(1).any(1).nonzero().flatten().tolist()}

    def places(self, number: int) -> Tensor | None:
        """Where a subject, or the background, is: (1 or rows, queries) bool on the CPU, or None for nowhere."""
        return self._places.get(number)


@dataclass(frozen=True, eq=False)
class Routing(Edit):
    """The routes of one run, which the edits behind it ask for. Amends nothing; notes its maps at `sites`.

    `names` are the subjects', for notes."""

    names: tuple[str, ...]
    _of_calls: MutableMapping[AttentionCall, Route | None] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )

    def _find(self, call: AttentionCall) -> Route | None:
        raise NotImplementedError

    def route(self, call: AttentionCall) -> Route | None:
        """The route of a call; None where nothing is known of its places."""
        if call not in self._of_calls:
            self._of_calls[call] = None if call.grid is None else self._find(call)
        return self._of_calls[call]

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if call.site.kind == "cross":
            return
        route = self.route(call)
        if route is not None:
            call.note("routing map", lambda: one_hot(route.numbers, route.count).unflatten(-1, call.grid), self.names)


class Router(Protocol):
    """The value on a ROUTER link. `models` are what the host is to move beside the MODEL that it routes in."""

    @property
    def models(self) -> tuple[Any, ...]: ...

    def routing(
        self, subjects: Sequence[Subject], order: Sequence[Site], acting: frozenset[Site], window: Window
    ) -> Routing:
        """The routing of these subjects. `order` are the model's sites as they run, `acting` those where routes will be
        asked for.

        Raises ValueError when the router does not fit the subjects."""


def names_of(subjects: Sequence[Subject]) -> tuple[str, ...]:
    """What subjects are called in notes: their phrases, or their numbers."""
    return tuple(subject.phrase or f"subject {number}" for number, subject in enumerate(subjects, 1))


def preceding(order: Iterable[Site]) -> dict[Site, Site]:
    """The attention to the prompt that each site's route is read from, of a model's sites as they run: a
    cross-attention's is itself, a self-attention's the cross-attention before it, a joint attention's the joint one
    before it, since its references are chosen before its own attention to the prompt is known."""
    before: dict[Site, Site] = {}
    last = None
    for site in order:
        if site.kind == "cross":
            last = site
        if last is not None:
            before[site] = last
        if site.kind == "joint":
            last = site
    return before
