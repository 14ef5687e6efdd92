"""Recycled self-attention (AnyLogo, sections 3.2 and 3.3).

The same U-Net runs on the reference, noised to the current level, and lends its self-attention's keys and values
to the generation (Eq. 4). Training-free here: the paper's U-Net is trained for it, a stock one already attends
well to features of its own kind.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.chunk import Chunk
from ..engine.edit import Edit, Request, Start
from ..engine.streams import Features, NoisedReference, Stream
from ..parts.rows import check_rows
from ..parts.sites import Site
from .encoded_subject import KeptReference, lend_kept, tensors_of
from .positions import Positions, placed_keys
from .region import Regions

# Where routes can be looked at without waiting for a GPU.
_CPU = torch.device("cpu")

# Equations


def extended_attention(query: Tensor, keys: list[Tensor], values: list[Tensor], heads: int) -> Tensor:
    """Eq. 4, as it stands: softmax(Q [K, K_ref]^T / sqrt(d)) [V, V_ref], tensors (rows, tokens, channels).

    The engine computes the same without this function; it is here to be read and to test against."""
    key, value = torch.cat(keys, 1), torch.cat(values, 1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    shares = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def is_recycled(keep_probability: float, seed: int, sigma: float, site: Site) -> bool:
    """Eq. 5: whether a layer keeps the reference at a noise level, k < lambda with k uniform on 0 to 1.

    k is a hash of seed, noise level and layer, so it does not depend on how often or in what order it is asked."""
    if keep_probability >= 1:
        return True
    digest = hashlib.blake2b(f"{seed} {sigma:.6g} {site.kind} {site}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < keep_probability


def flow_bias(strength: float, region: Tensor | None) -> Tensor | None:
    """What the continuous flow adds to the logits of reference keys: log(strength), which multiplies their attention
    weights by `strength` before the softmax is normalised. A region (rows, queries) of 0 to 1 weakens it place by
    place. Gives None for a strength of one everywhere, else something broadcastable to (rows, queries, keys)."""
    if region is not None and bool((region != region.round()).any()):
        return (strength * region).clamp(min=torch.finfo(torch.float32).tiny).log()[..., None]
    return None if strength == 1 else torch.tensor(math.log(strength)).view(1, 1, 1)


def lend(
    call: AttentionCall,
    references: Iterable[NoisedReference],
    recorded: Callable[[Stream], Features | None],
    positions: Positions | None,
    bias: Tensor | None,
    route: Tensor | None,
) -> None:
    """Extends a call by what was recorded of references that are seen together; see `AttentionCall.extend`."""
    found = [(reference, recorded(reference)) for reference in references]
    given = [(reference, features) for reference, features in found if features is not None]
    keys = placed_keys(positions, call, [(reference, features["key"]) for reference, features in given], route)
    for key, (_, features) in zip(keys, given, strict=True):
        call.extend(key, features["value"], bias, route)


# The edit


@dataclass(frozen=True, eq=False)
class RecycledSelfAttention(Edit):
    """Lets generation attend to references.

    `strength` above 0 is the continuous flow (1 is Eq. 4 as it stands), `keep_probability` the sparse recycling's
    lambda. `region_mask` (1 or batch, height, width) restricts it to queries inside. By Eq. 7 only chunks that a
    prompt conditions get the reference, unless `unconditioned_too`. `positions` moves or damps the references' keys.
    `kept` are references that a trained ReferenceNet has read."""

    node: ClassVar[str] = "Recycled Self-Attention"

    references: tuple[NoisedReference, ...]
    strength: float = 1.0
    keep_probability: float = 1.0
    region_mask: Tensor | None = None
    seed: int = 0
    unconditioned_too: bool = False
    positions: Positions | None = None
    kept: tuple[KeptReference, ...] = ()
    _regions: Regions = field(default_factory=Regions, init=False, repr=False)

    def begin(self) -> RecycledSelfAttention:
        return replace(self, kept=tuple(each.begin() for each in self.kept))

    def start(self, start: Start) -> None:
        if self.region_mask is not None:
            check_rows("region masks", len(self.region_mask), len(start.noise))

    def _kept(self, sigma: float) -> frozenset[Site]:
        return frozenset(s for s in self.sites if is_recycled(self.keep_probability, self.seed, sigma, s))

    def requests(self, sigma: float) -> Iterable[Request]:
        kept = self._kept(sigma)
        # A pass that serves several steps is worth having whole: other steps keep other layers.
        sites = [self.sites if each.how.serves_several else kept for each in self.references]
        return [(each, own, ("key", "value")) for each, own in zip(self.references, sites, strict=True) if kept]

    def brings(self) -> Iterable[Tensor]:
        return tensors_of(self.kept, self.sites)

    def wants(self, chunk: Chunk) -> bool:
        return chunk.conditioned or (self.unconditioned_too and chunk.generated)

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        if not is_recycled(self.keep_probability, self.seed, sigma, call.site):
            return
        if call.grid is None and not (self.region_mask is None and self.positions is None):
            call.leave(self.node)
            return
        region = route = None
        if self.region_mask is not None:
            region = self._regions.at(self.region_mask, call, _CPU)
            route = region > 0
            if not bool(route.any()):
                return
        bias = flow_bias(self.strength, region)
        lend(call, self.references, recorded, self.positions, bias, route)
        lend_kept(call, self.kept, bias, route)
