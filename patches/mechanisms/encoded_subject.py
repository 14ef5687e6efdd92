"""What a trained subject encoder made of a subject, ready for a U-Net's layers (AnyStory, section 3.2).

Neither the noise level nor the prompt decides it, so it is made once, by a node, and rides on SUBJECT.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..engine.call import AttentionCall
from ..parts.brought import Brought
from ..parts.sites import Site
from .image_prompt import AdaptedPrompt, KeysAndValues


@dataclass(frozen=True, eq=False)
class KeptReference:
    """Eq. 6's keys and values (1, n, channels) of one picture by site, as the file `encoder` made them: of every
    self-attention of a U-Net but the first, at the places that are the subject's. The U-Net's prompts have tokens of
    `context` channels."""

    encoder: str
    family: str
    context: int
    ready: Mapping[Site, KeysAndValues]
    _brought: Brought = field(default_factory=Brought, init=False, repr=False)

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.ready)

    def begin(self) -> KeptReference:
        """The same for one run, which holds what it has brought to the run's device."""
        return replace(self)

    def check(self, channels: Mapping[Site, int], context: int) -> None:
        """Raises ValueError unless it is for a U-Net whose self-attentions have these `channels`, in their order, and
        whose prompts have tokens of `context` channels."""
        wanted = {site: channels[site] for site in list(channels)[1:]}
        given = {site: key.shape[-1] for site, (key, _) in self.ready.items()}
        if self.context != context or given != wanted:
            raise ValueError(
                f"The subject was encoded by '{self.encoder}' for {self.family}, {len(given)} layers of up to "
                f"{max(given.values())} channels and prompts of {self.context}, but this model has {len(wanted)} of up "
                f"to {max(wanted.values())} and prompts of {context}; encode it with the subject encoder for this "
                "model's family."
            )

    def keys_and_values(self, call: AttentionCall) -> KeysAndValues | None:
        """Keys and values for a call, on its device and in its type; None where there are none for its layer."""
        ready = self.ready.get(call.site)
        return None if ready is None else self._brought.to(call.query, ready, call.site)


def tensors_of(kept: Iterable[KeptReference], sites: Iterable[Site]) -> list[Tensor]:
    """The keys and values of some references for some layers."""
    return [tensor for each in kept for site in sites for tensor in each.ready.get(site, ())]


def lend_kept(call: AttentionCall, kept: tuple[KeptReference, ...], bias: Tensor | None, route: Tensor | None) -> None:
    """Extends a call by references that are kept; see `AttentionCall.extend`."""
    for each in kept:
        ready = each.keys_and_values(call)
        if ready is not None:
            call.extend(*ready, bias, route)


@dataclass(frozen=True, eq=False)
class RoutingFeature:
    """What the router in the file `encoder` looks for a subject's places by: R_i of section 3.3, and R_N+1 of the
    background, each (1, width)."""

    encoder: str
    own: Tensor
    background: Tensor


@dataclass(frozen=True, eq=False)
class EncodedSubject:
    """A subject as a trained encoder sees it: a kept reference for each of its pictures, and its tokens with those of
    an empty picture. Either may be left out. `routing` is there where the encoder has a router."""

    references: tuple[KeptReference, ...]
    prompt: AdaptedPrompt | None
    routing: RoutingFeature | None = None
