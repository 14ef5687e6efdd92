"""Krea 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .rope import Rope, rope_of
from .transformer import Blocks, Transformer


@dataclass(frozen=True)
class Krea(Transformer):
    """Blocks with one set of weights for prompt and picture, in which four heads share a key. Attentions before them,
    which put the text encoder's layers together, are told no number and left alone. Its latents have frames, of which a
    picture is one."""

    blocks: tuple[Blocks, ...] = (Blocks("block", "single", "blocks"),)
    tells: bool = True

    def width(self, network: Any) -> int:
        return network.first.out_features

    def context_width(self, model: Any) -> int:
        network = model.model.diffusion_model
        return network.txtlayers * network.txtdim

    def repeats(self, network: Any) -> int:
        attention = network.blocks[0].attn
        return attention.heads // attention.kvheads

    def rope(self, network: Any) -> Rope:
        return rope_of(network.pe_embedder)


KREAS = (Krea("Krea 2", "Krea2"),)
