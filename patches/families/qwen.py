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

    def width(self, network: Any) -> int:
        return network.inner_dim

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.txt_in.in_features

    def rope(self, network: Any) -> Rope:
        return rope_of(network.pe_embedder)

    def first(self, grid: tuple[int, int]) -> tuple[int, int]:
        # Places count from the middle of each picture.
        return (-(grid[0] // 2), -(grid[1] // 2))


QWENS = (Qwen("Qwen-Image", "QwenImage"),)
