"""Semantic injection (AnyLogo, section 3.2 and appendix A).

What a picture shows of the subject reaches every cross-attention as tokens of a vision model: four groups of them, from
shallow to deep layers, one for each of the U-Net's scales, "with symmetrical variation between encoder and decoder",
and with each group one token of the background. A linear map for each group brings the tokens to the width of a
prompt's, and the layer's own projections make keys and values of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.edit import Edit
from ..engine.streams import Features, Stream
from ..parts.brought import Brought
from ..parts.sites import Site
from .routed_reference import token_attention

# The vision model's groups of layers, from shallow to deep; the last is the middle block's.
GROUPS = 4
# Of each group, the patches' tokens (rows, n, features) and the whole picture's (rows, features).
Hierarchy = tuple[tuple[Tensor, Tensor], ...]
# Of each group that there is, the weight (context, features) and bias (context) of its map.
Maps = Mapping[int, tuple[Tensor, Tensor]]

# Equations


def group_of(site: Site, scales: Mapping[tuple[str, int], int]) -> int:
    """Which group a cross-attention layer takes: that of its block's scale, 0 the finest, the same in encoder and
    decoder; the middle block takes the deepest. `scales` is of `families.unet.scales`."""
    return GROUPS - 1 if site.block == "middle" else min(scales[site.block, site.number], GROUPS - 1)


def layers_of(depth: int) -> tuple[int, ...]:
    """After how many of a vision model's `depth` layers its groups are taken: 6, 12, 18 and 24 of 24."""
    return tuple(depth * number // GROUPS for number in range(1, GROUPS + 1))


def semantic_tokens(patches: Tensor, background: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """One group's tokens (1, n, context): the subject's patches (1, n, features) and behind them the background's one
    (1, 1, features), or none, through the group's map, `weight` (context, features) and `bias` (context)."""
    seen = patches if background is None else torch.cat([patches, background], 1)
    return functional.linear(seen, weight, bias)


def injected(output: Tensor, term: Tensor, strength: float | Tensor, replaces: bool) -> Tensor:
    """A layer's output with the attention to the tokens, `term`: in the place of the attention to the prompt, as the
    paper has it ("we replace the conditional encoder"), or added to it. `strength` 0 is the output alone."""
    return torch.lerp(output, term, strength) if replaces else output + strength * term


# The edit


@dataclass(frozen=True, eq=False)
class SemanticInjection(Edit):
    """Shows every cross-attention of `groups` its group of `tokens` (1, n, context). By Eq. 7 only chunks that a prompt
    conditions see them."""

    node: ClassVar[str] = "Semantic Injection"

    tokens: Mapping[int, Tensor]
    groups: Mapping[Site, int]
    strength: float = 1.0
    replaces: bool = False
    _brought: Brought = field(default_factory=Brought, init=False, repr=False)

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        group = self.groups[call.site]
        key, value = call.project(*self._brought.to(call.query, (self.tokens[group],), group))
        query, heads = call.query, call.heads

        def inject(output: Tensor) -> Tensor:
            term = token_attention(query, key, value, heads)
            return injected(output, term.to(output), self.strength, self.replaces)

        # What other nodes add to the layer stays: only the attention to the prompt is replaced.
        call.blend(inject, first=self.replaces)


def grouped(sites: Iterable[Site], scales: Mapping[tuple[str, int], int]) -> dict[Site, int]:
    """The group of every cross-attention among a U-Net's sites."""
    return {site: group_of(site, scales) for site in sites if site.kind == "cross"}


def tokens_of(maps: Maps, subjects: Iterable[Hierarchy], background: Hierarchy | None) -> dict[int, Tensor]:
    """The tokens (1, n, context) of each group that has a map, of some subjects' pictures and of a background."""
    seen = list(subjects)
    made = {}
    for group, (weight, bias) in maps.items():
        patches = torch.cat([each[group][0].flatten(0, 1) for each in seen])[None]
        behind = None if background is None else background[group][1][:1, None]
        made[group] = semantic_tokens(patches, behind, weight, bias)
    return made
