"""Lumina 2, and Z-Image, which is made of its blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..sites import Kind
from .rope import Rope, rope_of
from .transformer import Blocks, Tokens, Transformer


@dataclass(frozen=True)
class Lumina(Transformer):
    """Blocks with one set of weights for prompt and picture. Blocks before them, which refine either by itself, have no
    number and are left alone. Prompt and picture are each filled up to a `multiple` of tokens, on the right."""

    blocks: tuple[Blocks, ...] = (Blocks("block", "double", "layers"),)
    multiple: int = 1

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.cap_embedder[1].in_features

    def filled(self, tokens: int) -> int:
        """How many tokens the model makes of so many."""
        return -(-tokens // self.multiple) * self.multiple

    def tokens(
        self,
        kind: Kind,
        queries: int,
        keys: int,
        grid: tuple[int, int],
        context: int,
        references: int,
        begins: int | None,
    ) -> Tokens | None:
        count = math.prod(grid)
        start = queries - self.filled(count)
        if start < context or queries != keys:
            return None
        own = slice(start, start + count)
        # With pictures of the host's own before it, prompts of theirs, too, come before the prompt.
        prompt = slice(0, context) if start == self.filled(context) else None
        return Tokens(own, own, prompt)

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
