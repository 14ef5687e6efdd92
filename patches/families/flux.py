"""FLUX.1, and the families whose models are made of its blocks: Chroma, FLUX.2 and Klein."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rope import Rope, rope_of
from .transformer import Blocks, Transformer

FLUX_BLOCKS = (Blocks("double", "double", "double_blocks"), Blocks("single", "single", "single_blocks"))


@dataclass(frozen=True)
class Flux(Transformer):
    """Double blocks, in which prompt and picture have weights of their own and attend together, then single ones."""

    blocks: tuple[Blocks, ...] = FLUX_BLOCKS
    tells: bool = True

    def context_width(self, model: Any) -> int:
        return model.model.diffusion_model.txt_in.in_features

    def shown(self, inner: Any, known: Tensor) -> dict[str, Tensor]:
        network, own = inner.diffusion_model, inner.model_config.unet_config["out_channels"]
        if network.img_in.weight.shape[1] // network.patch_size**2 <= 2 * own:
            # What a control model (Canny, Depth) is shown is no picture.
            return {"latent_image": known}
        # FLUX Fill: the known picture as the VAE gave it, with nothing of it hidden.
        hidden = torch.zeros((known.shape[0], 1, *known.shape[2:]))
        return {"latent_image": known, "concat_latent_image": inner.process_latent_out(known), "concat_mask": hidden}

    def rope(self, network: Any) -> Rope:
        return rope_of(network.pe_embedder)


@dataclass(frozen=True)
class Flux2(Flux):
    """The host fills a prompt up to 512 tokens from the left."""

    def before(self, conditioning: Mapping[str, Any]) -> int:
        encoded, given = conditioning.get("model_conds", {}).get("c_crossattn"), conditioning.get("cross_attn")
        if encoded is None or given is None:
            return 0
        return max(encoded.cond.shape[1] - given.shape[1], 0)


FLUXES = (
    Flux2("FLUX.2", "Flux2", patch=1),
    # Radiance works on pixels, without a VAE.
    Flux("Chroma", "Chroma", but=("ChromaRadiance",)),
    Flux("FLUX.1", "Flux"),
)
