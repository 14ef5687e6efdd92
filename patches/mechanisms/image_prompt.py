"""Image prompts: what a cross-attention layer attends to beside the text (AnyStory, Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from ..engine.call import AttentionCall
from ..parts.brought import Brought
from ..parts.sites import Site

KeysAndValues = tuple[Tensor, Tensor]
# In which order IP-Adapter's published files number a U-Net's blocks.
_FILE_ORDER = ("input", "output", "middle")


class ImagePrompt(Protocol):
    """What a layer shows of a subject besides the text."""

    def begin(self) -> ImagePrompt:
        """The same for one run, which holds what it has brought to the run's device."""

    def keys_and_values(self, call: AttentionCall) -> KeysAndValues:
        """Keys and values (1, n, channels) for a call, on its device and in its type."""


@dataclass(frozen=True, eq=False)
class TokenPrompt:
    """Tokens (1, n, channels of a prompt): the layer's own projections make its keys and values."""

    tokens: Tensor
    _brought: Brought = field(default_factory=Brought, init=False, repr=False)

    def begin(self) -> TokenPrompt:
        return replace(self)

    def keys_and_values(self, call: AttentionCall) -> KeysAndValues:
        return call.project(*self._brought.to(call.query, (self.tokens,)))


@dataclass(frozen=True, eq=False)
class ReadyPrompt:
    """Keys and values (1, n, channels) by site, of projections that were trained for it."""

    ready: Mapping[Site, KeysAndValues]
    _brought: Brought = field(default_factory=Brought, init=False, repr=False)

    def begin(self) -> ReadyPrompt:
        return replace(self)

    def keys_and_values(self, call: AttentionCall) -> KeysAndValues:
        return self._brought.to(call.query, self.ready[call.site], call.site)


@dataclass(frozen=True, eq=False)
class AdaptedPrompt:
    """What the file `adapter` made of a subject's pictures, and of an empty picture, which stands in the unconditional
    pass: keys and values (1, n, channels) for all cross-attention layers of a U-Net whose prompts have tokens of
    `context` channels, in the published order."""

    adapter: str
    context: int
    subject: tuple[KeysAndValues, ...]
    empty: tuple[KeysAndValues, ...]

    def at(self, channels: Mapping[Site, int], context: int) -> tuple[ReadyPrompt, ReadyPrompt]:
        """The subject's and the empty picture's, by site; `channels` has every cross-attention site of a model, whose
        prompts have tokens of `context` channels.

        Raises ValueError when the model is not one that the adapter is for."""
        sites = in_file_order(channels)
        given = [key.shape[-1] for key, _ in self.subject]
        if self.context != context or given != [channels[site] for site in sites]:
            raise ValueError(
                f"The adapter '{self.adapter}' is for prompts of {self.context} channels and has {len(given)} layers "
                f"of up to {max(given)}; this model's prompts have {context}, and it has {len(sites)} layers of up to "
                f"{max(channels.values())}. Take the adapter for this model's family."
            )
        subject, empty = (dict(zip(sites, pairs, strict=True)) for pairs in (self.subject, self.empty))
        return ReadyPrompt(subject), ReadyPrompt(empty)


def in_file_order(sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of the published files: encoder, decoder, then the middle block."""
    return sorted(sites, key=lambda site: (_FILE_ORDER.index(site.block), site.number, site.index))
