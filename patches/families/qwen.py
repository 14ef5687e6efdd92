"""Qwen-Image and its edit models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .rope import Rope, rope_of
from .transformer import Blocks, Transformer


@dataclass(frozen=True)
class Qwen(Transformer):
    """Blocks in which prompt and picture have weights of their own and attend together. Its latents have frames, of
    which a picture is one."""

    blocks: tuple[Blocks, ...] = (Blocks("block", "double", "transformer_blocks"),)
    tells: bool = True

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.txt_in.in_features

    def rope(self, network: Any) -> Rope:
        return rope_of(network.pe_embedder)

    def beside(self, reference: tuple[int, int], picture: tuple[int, int]) -> tuple[float, ...]:
        # Axes: frame, height, width. Places count from the middle of each picture.
        return (0.0, 0.0, -float(picture[1] // 2 + reference[1] - reference[1] // 2))


QWENS = (Qwen("Qwen-Image", "QwenImage"),)
