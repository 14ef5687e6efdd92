"""Small VAEs of the host's own class with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.sd
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.taesd.taesd import TAESD
from hosting.random_models import fill
from torch import Tensor


class NotingVae(comfy.sd.VAE):
    """Keeps the pictures that it encodes."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.given: list[Tensor] = []

    def encode(self, pixel_samples: Tensor) -> Tensor:
        self.given.append(pixel_samples)
        return super().encode(pixel_samples)


def noting_vae(channels: int = 4, seed: int = 3) -> NotingVae:
    """An SD 1.x's VAE in all but width: a latent pixel is 8 x 8 of the picture."""
    sizes = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "z_channels": channels}
    sizes |= {"double_z": True, "resolution": 64, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    params = {"ddconfig": sizes, "embed_dim": channels}
    # Whoever asks first may be in the inference mode that nodes run in, where weights could not be used outside of it.
    with torch.inference_mode(False):
        network = AutoencoderKL(**params)
        fill(network, seed)
        return NotingVae(sd=network.state_dict(), config={"params": params})


def tiny_weights(channels: int) -> dict[str, Tensor]:
    """Those of a TAESD, which the host takes for a VAE of as many channels."""
    network = TAESD(latent_channels=channels)
    fill(network, 3)
    network.vae_scale.data.fill_(1)
    return network.state_dict()


@cache
def small_vae(channels: int = 4) -> comfy.sd.VAE:
    """One for all tests."""
    return noting_vae(channels)
