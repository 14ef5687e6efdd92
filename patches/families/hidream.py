"""HiDream I1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parts.sites import Kind
from .rope import Rope, rope_of
from .transformer import Blocks, Counts, Tokens, Transformer


@dataclass(frozen=True)
class HiDream(Transformer):
    """Double blocks, in which prompt and picture have weights of their own, then single ones; the picture comes first.
    The attention is told nothing of its block, so the order of calls is all there is. A prompt is T5's tokens, then
    those of Llama's last layer, which the blocks change, then again those of a layer of Llama for each block."""

    blocks: tuple[Blocks, ...] = (
        Blocks("double", "", "double_stream_blocks"),
        Blocks("single", "", "single_stream_blocks"),
    )
    told: str = "order"

    def width(self, network: Any) -> int:
        return network.inner_dim

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.caption_projection[-1].linear.in_features

    def again(self, conditioning: Mapping[str, Any]) -> tuple[int, int]:
        encoded = conditioning.get("model_conds", {})
        if not {"c_crossattn", "encoder_hidden_states_llama3"} <= encoded.keys():
            return (0, 0)
        return encoded["c_crossattn"].cond.shape[1], encoded["encoder_hidden_states_llama3"].cond.shape[2]

    def context_length(self, context: Tensor | None, given: Mapping[str, Any]) -> int:
        if given.get("image_cond") is not None:
            raise ValueError(
                "This prompt shows HiDream a picture to edit, whose tokens lie among those of the new one; take it out "
                "of the prompt, or Subject Patches' nodes out of the model's way."
            )
        return context.shape[1] + 2 * given["encoder_hidden_states_llama3"].shape[2]

    def tokens(self, kind: Kind, counts: Counts) -> Tokens | None:
        count, every = counts.picture, counts.picture + counts.context
        if not counts.queries == counts.keys == every:
            return None
        return Tokens(slice(0, count), slice(0, count), slice(count, every))

    def rope(self, network: Any) -> Rope:
        return rope_of(network.pe_embedder)


HIDREAMS = (HiDream("HiDream", "HiDream"),)
