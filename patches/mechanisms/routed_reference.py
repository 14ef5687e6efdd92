"""Routed reference attention (AnyStory, section 3.3): every subject's features reach the places that are its own.

Self-attention goes over the picture and the subjects' references, a reference being seen only where the route gives the
place to its subject (Eq. 6 to 8); cross-attention adds the subjects' image prompts by the same route (Eq. 5). Without
a trained ReferenceNet the references' features are the host's own U-Net's, and the projections its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.chunk import Chunk
from ..engine.edit import Edit, Request, Start
from ..engine.streams import Features, NoisedReference, Stream
from .encoded_subject import KeptReference, lend_kept, tensors_of
from .image_prompt import ImagePrompt
from .positions import Positions
from .recycled_attention import flow_bias, lend
from .router import Routing

# Equations


def routed_reference_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    maps: Tensor,
    gammas: Sequence[float],
    heads: int,
) -> Tensor:
    """Eq. 6 to 8, as they stand: softmax(Q [K, K_1 .. K_N]^T / sqrt(d) + Bias) [V, V_1 .. V_N], Bias being 0 on the own
    keys and, on those of subject i, gamma_i where sigma(M_i) is 1 and minus infinity elsewhere.

    `query`, the own and then the subjects' `keys` and `values` are (rows, tokens, channels), `maps` (rows, N, queries)
    of 0 and 1. The engine computes the same without this function and without its mask, by grouping the queries of one
    subject; it is here to be read and to test against."""
    biases = [torch.zeros(*query.shape[:2], keys[0].shape[1])]
    for number, (key, gamma) in enumerate(zip(keys[1:], gammas, strict=True)):
        seen = torch.where(maps[:, number] == 1, gamma, -math.inf)
        biases.append(seen[..., None].expand(-1, -1, key.shape[1]))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, torch.cat(keys, 1), torch.cat(values, 1)))
    shares = (q @ k.mT / math.sqrt(q.shape[-1]) + torch.cat(biases, -1)[:, None]).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def token_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Softmax(Q K_i^T / sqrt(d)) V_i of Eq. 5: tensors (rows, tokens, channels), keys and values of every row or of one
    for all."""
    rows = len(query)
    q, k, v = (t.expand(rows, -1, -1).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def inject(output: Tensor, query: Tensor, key: Tensor, value: Tensor, heads: int, mine: Tensor, eta: float) -> Tensor:
    """One subject's term of Eq. 5: output + eta * sigma(M_i) * Softmax(Q K_i^T / sqrt(d)) V_i.

    `output` and `query` are (rows, queries, channels), `key` and `value` (1, n, channels), `mine` is sigma(M_i), (1 or
    rows, queries) bool on the CPU: only the queries in it are computed."""
    output = output.clone()
    shared = len(mine) == 1
    for row, places in enumerate(mine):
        rows = slice(None) if shared else slice(row, row + 1)
        queries = places.nonzero().squeeze(1).to(query.device)
        if len(queries):
            term = token_attention(query[rows][:, queries], key, value, heads)
            output[rows, queries] += eta * term.to(output)
    return output


# The edits


@dataclass(frozen=True, eq=False)
class RoutedReference(Edit):
    """One subject of a routing, `number` from 0: its references are seen at its own places, with `strength` times
    their attention weights (its logarithm is gamma). `positions` moves or damps their keys. `kept` are references that
    a trained ReferenceNet has read."""

    node: ClassVar[str] = "Routed Reference Attention"

    routing: Routing
    number: int
    references: tuple[NoisedReference, ...]
    strength: float = 1.0
    positions: Positions | None = None
    kept: tuple[KeptReference, ...] = ()

    def begun(self, routing: Routing) -> RoutedReference:
        """The edit for one run, with that run's routing."""
        return replace(self, routing=routing, kept=tuple(each.begin() for each in self.kept))

    def requests(self, sigma: float) -> Iterable[Request]:
        return [(reference, self.sites, ("key", "value")) for reference in self.references]

    def brings(self) -> Iterable[Tensor]:
        return tensors_of(self.kept, self.sites)

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        route = self.routing.route(call)
        if call.grid is None:
            call.leave(self.node)
        mine = None if route is None else route.places(self.number)
        if mine is None:
            return
        bias = flow_bias(self.strength, None)
        lend(call, self.references, recorded, self.positions, bias, mine)
        lend_kept(call, self.kept, bias, mine)


@dataclass(frozen=True, eq=False)
class RoutedTokens(Edit):
    """The image prompt of one subject of a routing, or of the background (`number` N), added at its own places with the
    weight `eta`."""

    node: ClassVar[str] = "Routed Reference Attention (an image prompt)"

    routing: Routing
    number: int
    prompt: ImagePrompt
    eta: float = 1.0

    def begun(self, routing: Routing) -> RoutedTokens:
        """The edit for one run, with that run's routing."""
        return replace(self, routing=routing, prompt=self.prompt.begin())

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if call.grid is None:
            call.leave(self.node)
            return
        key, value = self.prompt.keys_and_values(call)
        query, heads = call.query, call.heads

        def add(output: Tensor) -> Tensor:
            # Asked only now: a route by maps is that of this very attention, with what every edit amended in it.
            route = self.routing.route(call)
            mine = None if route is None else route.places(self.number)
            return output if mine is None else inject(output, query, key, value, heads, mine, self.eta)

        call.blend(add)


@dataclass(frozen=True, eq=False)
class EmptyTokens(Edit):
    """The image prompt of an empty picture at every place of the unconditional pass, with the weight `eta`: as the
    authors of AnyStory and of IP-Adapter do, whose projections were trained with it there."""

    prompt: ImagePrompt
    eta: float = 1.0

    def begin(self) -> EmptyTokens:
        return replace(self, prompt=self.prompt.begin())

    def begun(self, routing: Routing) -> EmptyTokens:
        """The edit for one run: the routing does not decide it."""
        return self.begin()

    def wants(self, chunk: Chunk) -> bool:
        return chunk.generated and not chunk.conditioned

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        key, value = self.prompt.keys_and_values(call)
        query, heads = call.query, call.heads

        def add(output: Tensor) -> Tensor:
            return output + self.eta * token_attention(query, key, value, heads)

        call.blend(add)


@dataclass(frozen=True, eq=False)
class RoutedReferenceAttention(Edit):
    """All subjects of one node. In a run it falls into `routing` and an edit for each of `shares`, most of which ask
    it."""

    routing: Routing
    shares: tuple[RoutedReference | RoutedTokens | EmptyTokens, ...]

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        self.routing.check(prompts)

    def begin(self) -> RoutedReferenceAttention:
        routing = self.routing.begin()
        return replace(self, routing=routing, shares=tuple(share.begun(routing) for share in self.shares))

    def start(self, start: Start) -> None:
        self.routing.start(start)

    def parts(self) -> Iterable[Edit]:
        return (self.routing, *self.shares)
