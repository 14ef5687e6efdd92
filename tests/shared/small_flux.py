"""A small FLUX.1 and its VAE as files for the host's own loaders, and AnyStory's weights for it as its authors publish
them, under the names of the released files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.supported_models
import convert
import torch
from hosting.random_models import FLUX, generator, model_of
from safetensors.torch import save_file
from subject_patches.encoders.anystory_file import Form

from .clips import SMALL, T5
from .small_vaes import tiny_weights
from .small_vision import VISION

# As wide as the host's detection allows: heads of 128 channels.
SIZES: dict[str, Any] = {
    **FLUX,
    "hidden_size": 256,
    "num_heads": 2,
    "depth": 1,
    "context_in_dim": T5["d_model"],
    "vec_in_dim": SMALL["hidden_size"],
}
RANK = 4


def write_flux(models: Path) -> None:
    """FLUX.1 dev and its VAE, in the server's folders."""
    network = model_of(comfy.supported_models.Flux, SIZES).model.diffusion_model
    _save(network.state_dict(), models / "diffusion_models" / "flux1-dev.safetensors")
    write_vae(models)


def write_vae(models: Path) -> None:
    """A VAE of 16 channels, as FLUX.1 and Z-Image have one."""
    _save(tiny_weights(16), models / "vae" / "ae.safetensors")


def write_anystory(models: Path, name: str = "anystory_flux", **sizes: int) -> None:
    """AnyStory's weights for it, published and converted; `sizes` of their form go over those of the small FLUX."""
    given = {"double": SIZES["depth"], "single": SIZES["depth_single_blocks"], "width": SIZES["hidden_size"]}
    given |= {"context": SIZES["context_in_dim"], "packed": 4 * SIZES["in_channels"], "vision": VISION}
    given |= dict.fromkeys(("reference_rank", "router_rank", "map_rank", "embedder_rank"), RANK)
    source = generator(7)
    parts = {
        part: {name: torch.randn(shape, generator=source) / shape[-1] ** 0.5 for name, shape in named.items()}
        for part, named in Form(**{**given, **sizes}).shapes().items()
    }
    folder = models / "subject_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    published = folder / f"{name}.bin"
    torch.save(parts, published)
    convert.convert(published, folder / f"{name}.safetensors")


def _save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, path)
