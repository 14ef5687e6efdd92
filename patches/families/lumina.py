"""Lumina 2, and Z-Image, which is made of its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..parts.sites import Kind
from .rope import Rope, rope_of
from .transformer import Blocks, Counts, Tokens, Transformer


@dataclass(frozen=True)
class Lumina(Transformer):
    """Blocks with one set of weights for prompt and picture. Blocks before them, which refine either by itself, have no
    number and are left alone. Prompt and picture are each filled up to a `multiple` of tokens, on the right."""

    blocks: tuple[Blocks, ...] = (Blocks("block", "double", "layers"),)
    multiple: int = 1

    def width(self, network: Any) -> int:
        return network.dim

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.cap_embedder[1].in_features

    def filled(self, tokens: int) -> int:
        """How many tokens the model makes of so many."""
        return -(-tokens // self.multiple) * self.multiple

    def stands_at(self, context: int) -> int:
        return self.filled(context) + 1

    def tokens(self, kind: Kind, counts: Counts) -> Tokens | None:
        count, context, ahead = counts.picture, counts.context, counts.ahead
        start = counts.queries - self.filled(count)
        if start < context or counts.queries != counts.keys:
            return None
        # With pictures of the host's own, more of theirs follows the prompt.
        end = ahead + self.filled(context)
        if start < end or (start > end and not ahead):
            return None
        return Tokens(slice(start, start + count), slice(start, start + count), slice(ahead, ahead + context))

    def tokens_ahead(self, given: Mapping[str, Any]) -> int:
        # One for each of the host's pictures, filled up like the prompt, or nothing but filling; one more follows it.
        pictures = len(given.get("ref_latents", ()))
        prompts = given.get("ref_contexts", ())[:pictures]
        return sum(self.filled(each.shape[1]) for each in prompts) + (pictures - len(prompts)) * self.multiple

    def repeats(self, network: Any) -> int:
        attention = network.layers[0].attention
        return attention.n_local_heads // attention.n_local_kv_heads

    def rope(self, network: Any) -> Rope:
        return rope_of(network.rope_embedder)


LUMINAS = (
    # The one of pixels works without a VAE.
    Lumina("Z-Image", "ZImage", multiple=32, but=("ZImagePixelSpace",)),
    Lumina("Lumina 2", "Lumina2", but=("ZImage", "ZImagePixelSpace")),
)
