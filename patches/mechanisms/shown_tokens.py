"""Image prompts of subjects that no router places: shown everywhere, as in the first stage of AnyStory's training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..engine.call import AttentionCall
from ..engine.edit import Edit, Start
from ..engine.streams import Features, Stream
from ..parts.rows import check_rows
from .image_prompt import ImagePrompt
from .region import Regions
from .routed_reference import token_attention


@dataclass(frozen=True, eq=False)
class ShownTokens(Edit):
    """Eq. 5 without its maps: text attention + eta * the sum of the attentions over each of `prompts`. A `region_mask`
    (1 or batch, height, width) of 0 to 1 gives them their share of a place, and the rest, for each of them, to the
    tokens of the `empty` picture, which a router gives the background."""

    node: ClassVar[str] = "Recycled Self-Attention (a subject's tokens)"

    prompts: tuple[ImagePrompt, ...]
    empty: ImagePrompt
    eta: float = 1.0
    region_mask: Tensor | None = None
    _regions: Regions = field(default_factory=Regions, init=False, repr=False)

    def begin(self) -> ShownTokens:
        prompts = tuple(prompt.begin() for prompt in self.prompts)
        return replace(self, prompts=prompts, empty=self.empty.begin())

    def start(self, start: Start) -> None:
        if self.region_mask is not None:
            check_rows("region masks", len(self.region_mask), len(start.noise))

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        query, heads = call.query, call.heads
        shares: list[tuple[ImagePrompt, Tensor | float]] = [(prompt, self.eta) for prompt in self.prompts]
        if self.region_mask is not None:
            if call.grid is None:
                call.leave(self.node)
                return
            region = self._regions.at(self.region_mask, call, query.device).to(query)[..., None]
            shares = [(prompt, self.eta * region) for prompt in self.prompts]
            shares.append((self.empty, len(self.prompts) * self.eta * (1 - region)))
        ready = [(prompt.keys_and_values(call), share) for prompt, share in shares]

        def add(output: Tensor) -> Tensor:
            for (key, value), share in ready:
                output = output + share * token_attention(query, key, value, heads)
            return output

        call.blend(add)
