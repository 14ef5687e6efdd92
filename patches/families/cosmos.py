"""Cosmos-Predict2, for pictures, and Anima, which is made of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parts.sites import Kind, Site
from .rope import Rope, frequencies
from .transformer import Blocks, Transformer


@dataclass(frozen=True)
class Cosmos(Transformer):
    """Blocks of a self- and a cross-attention. Its latents have frames, of which a picture is one."""

    blocks: tuple[Blocks, ...] = (Blocks("block", "", "blocks"),)

    def kinds(self, network: Any, word: str, number: int) -> tuple[Kind, ...]:
        return ("self", "cross")

    def width(self, network: Any) -> int:
        return network.model_channels

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.blocks[0].cross_attn.context_dim

    def project(self, network: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        layer = network.blocks[site.number].cross_attn
        key = layer.k_norm(layer.k_proj(tokens).unflatten(-1, (layer.n_heads, -1))).flatten(2)
        return key, layer.v_proj(tokens)

    def rope(self, network: Any) -> Rope:
        places = network.pos_embedder
        sizes = [2 * len(each) for each in (places.dim_temporal_range, *[places.dim_spatial_range] * 2)]
        bases = [10000.0 * f for f in (places.t_ntk_factor, places.h_ntk_factor, places.w_ntk_factor)]
        return Rope(frequencies(sizes, bases), halves=True)


COSMOSES = (Cosmos("Anima", "Anima"), Cosmos("Cosmos-Predict2", "CosmosT2IPredict2", but=("CosmosI2VPredict2",)))
