"""Stable Diffusion's U-Nets. The host has a slot for each of their attentions: see `slots.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..parts.sites import Site
from .family import Family


@dataclass(frozen=True)
class UNet(Family):
    """A U-Net whose blocks hold self- and cross-attention by turns."""

    def has(self, model: Any) -> bool:
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        config = model.model.model_config
        known = isinstance(model.model.diffusion_model, UNetModel) and super().has(model)
        # The x4 upscaler's self-attentions read the prompt.
        other = ("use_temporal_attention", "disable_self_attentions")
        return known and not any(config.unet_config.get(name) for name in other)

    def sites(self, network: Any) -> tuple[Site, ...]:
        return sites_of(network)

    def usual(self, choice: str) -> str:
        return choice

    def shown(self, inner: Any, known: Tensor) -> dict[str, Tensor]:
        return shown_whole(known)

    def looks_nearly_clean(self) -> bool:
        # Of a 1,024 pixel subject SDXL's decoder stores 272 MB a step: 2 GB hold 7 of 30 steps. SD 1.x and 2.x store 28
        # MB at 512 pixels and 63 at 768.
        return self.description in ("SDXL", "SDXLRefiner")

    def reference_level(self) -> float:
        # At 1 the toy lost emblems, at 0.9 none (docs/EFFECTS.md).
        return 0.9

    def dci_gain_grows(self) -> bool:
        return self.description != "SD15"

    def context_width(self, model: Any) -> int:
        return model.model.model_config.unet_config["context_dim"]

    def project(self, network: Any, site: Site, tokens: Tensor) -> tuple[Tensor, Tensor]:
        layer = layer_at(network, site)
        return layer.to_k(tokens), layer.to_v(tokens)

    def grid_at(self, network: Any, site: Site, latent: tuple[int, int]) -> tuple[int, int]:
        finer = 2 ** scales(network)[site.block, site.number]
        return (-(-latent[0] // finer), -(-latent[1] // finer))

    def channels(self, network: Any, site: Site, part: str) -> int:
        layer = layer_at(network, site)
        return layer.heads * layer.dim_head

    def heads(self, network: Any, site: Site) -> int:
        """How many heads a layer has."""
        return layer_at(network, site).heads


def shown_whole(known: Tensor) -> dict[str, Tensor]:
    """What tells an inpainting U-Net that nothing of clean latents (rows, channels, height, width) is hidden."""
    return {"latent_image": known, "denoise_mask": torch.zeros((known.shape[0], 1, *known.shape[2:]))}


def transformer_blocks(network: Any) -> dict[tuple[str, int, int], Any]:
    """The host's modules that hold a U-Net's attentions, by the host's key of them, in the order in which they run."""
    from comfy.ldm.modules.attention import SpatialTransformer

    stages = (
        ("input", network.input_blocks),
        ("middle", [network.middle_block]),
        ("output", network.output_blocks),
    )
    found = {}
    for block, modules in stages:
        for number, module in enumerate(modules):
            for layer in module or ():
                if isinstance(layer, SpatialTransformer):
                    found |= {(block, number, index): each for index, each in enumerate(layer.transformer_blocks)}
    return found


def sites_of(network: Any) -> tuple[Site, ...]:
    """Every attention layer of a U-Net, in the order in which they run."""
    return tuple(Site(kind, *key) for key in transformer_blocks(network) for kind in ("self", "cross"))


def layer_at(network: Any, site: Site) -> Any:
    """The host's module of an attention layer in a U-Net."""
    from comfy.ldm.modules.attention import SpatialTransformer

    if site.block == "middle":
        block = network.middle_block
    else:
        block = (network.input_blocks if site.block == "input" else network.output_blocks)[site.number]
    transformer = next(layer for layer in block if isinstance(layer, SpatialTransformer))
    blocks = transformer.transformer_blocks[site.index]
    return blocks.attn1 if site.kind == "self" else blocks.attn2


def scales(network: Any) -> dict[tuple[str, int], int]:
    """By how many halvings each block of a U-Net is coarser than the latents, by the host's name and number of it."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

    found, scale = {}, 0
    for number, block in enumerate(network.input_blocks):
        scale += any(isinstance(layer, Downsample) for layer in block)
        found["input", number] = scale
    found["middle", 0] = scale
    for number, block in enumerate(network.output_blocks):
        found["output", number] = scale
        # Where a block makes its output finer, it does so last.
        scale -= any(isinstance(layer, Upsample) for layer in block)
    return found


UNETS = (
    UNet("SD 1.x", "SD15"),
    UNet("SD 2.x", "SD20"),
    UNet("SDXL", "SDXL"),
    UNet("SDXL refiner", "SDXLRefiner"),
)
