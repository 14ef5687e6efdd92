"""Pictures of other things of a concept's noun, with captions of their own, which half of an ICO training sees.

What the projections do to prompts without the concept then stays nearer to what they did (authors' code of DCI; Custom
Diffusion and DreamBooth before it)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..patches.parts.writing import shortened
from .text import TextEncoder


@dataclass(frozen=True)
class Regularisation:
    """Pictures as latents (n, versions, channels, h, w), as the VAE gave them, and a caption for each."""

    latents: Tensor
    captions: Sequence[str]

    def encoded(self, encoder: TextEncoder) -> tuple[Tensor, Tensor | None]:
        """The contexts (n, 77, width) of the captions and the pooled outputs (n, width) where the family has them. No
        word of them learns. Raises ValueError for a caption that does not fit into one chunk."""
        texts = list(dict.fromkeys(self.captions))
        prompts = [encoder.tokenize(text) for text in texts]
        for text, tokens in zip(texts, prompts, strict=True):
            if any(len(chunks) > 1 for chunks in tokens.values()):
                raise ValueError(
                    f"The regularisation caption '{shortened(text)}' is longer than 75 tokens; shorten it."
                )
        with torch.no_grad():
            contexts, pooled = zip(*(encoder.encode(tokens) for tokens in prompts), strict=True)
        rows = [texts.index(text) for text in self.captions]
        return torch.cat(contexts)[rows], None if pooled[0] is None else torch.cat(pooled)[rows]


def regularised(batch: int, generator: torch.Generator) -> int:
    """How many of a step's pictures are for regularisation: half of them, of an odd number the odd one by chance."""
    return (batch + int(torch.randint(2, (), generator=generator))) // 2
