"""Wan, text to video, for one frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parts.sites import Kind, Site
from .rope import Rope, rope_of
from .transformer import Blocks, Transformer


@dataclass(frozen=True)
class Wan(Transformer):
    """Blocks of a self- and a cross-attention. Its latents have frames, of which a picture is one."""

    blocks: tuple[Blocks, ...] = (Blocks("block", "double", "blocks"),)

    def has(self, model: Any) -> bool:
        # The others of the host's Wans, which are shown pictures, poses or sounds, are subclasses, or have weights for
        # them that these lack.
        network = model.model.diffusion_model
        plain = type(model.model.model_config).__name__ == self.description
        return plain and network.ref_conv is None and network.patch_embedding.in_channels == network.out_dim

    def kinds(self, network: Any, word: str, number: int) -> tuple[Kind, ...]:
        return ("self", "cross")

    def width(self, network: Any) -> int:
        return network.dim

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.text_embedding[0].in_features

    def project(self, network: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        layer, context = network.blocks[site.number].cross_attn, network.text_embedding(tokens)
        return layer.norm_k(layer.k(context)), layer.v(context)

    def rope(self, network: Any) -> Rope:
        return rope_of(network.rope_embedder)


# The 14B models of 2.2 are those of 2.1 to the host; that of 5B has a VAE of its own.
WANS = (Wan("Wan", "WAN21_T2V"), Wan("Wan", "WAN22_T2V"))
