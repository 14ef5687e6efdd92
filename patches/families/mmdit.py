"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..parts.sites import Kind
from .transformer import Blocks, Transformer


@dataclass(frozen=True)
class MMDiT(Transformer):
    """Blocks in which prompt and picture attend together; in those of 3.5 Medium's first half the picture attends to
    itself besides. The attention is told nothing of its block, which the host's slots for replacements know. Places are
    added to the picture's features, so no key can be turned to another."""

    blocks: tuple[Blocks, ...] = (Blocks("block", "double_block", "joint_blocks"),)
    told: str = "replacement"

    def kinds(self, network: Any, word: str, number: int) -> tuple[Kind, ...]:
        return ("joint", "self") if network.joint_blocks[number].x_block.x_block_self_attn else ("joint",)

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.context_embedder.in_features


MMDITS = (MMDiT("SD 3.5", "SD3"),)
