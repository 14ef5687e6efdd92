"""The models that cases begin with, and what loads them."""

from __future__ import annotations

from typing import Any

from hosting.client import ApiPrompt

Link = list[Any]
# What each model's loaders are, and the link of its MODEL, CLIP and VAE.
HOMES: dict[str, tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, Link]]] = {
    **{
        name: ({name: (kind, inputs)}, {"MODEL": [name, 0], "CLIP": [name, 1], "VAE": [name, 2]})
        for name, kind, inputs in (
            ("toy", "CheckpointLoaderSimple", {"ckpt_name": "subject-patches-toy.safetensors"}),
            ("toy dit", "CheckpointLoaderSimple", {"ckpt_name": "subject-patches-toy-dit.safetensors"}),
            ("sd15", "SmallCheckpoint", {"family": "sd15"}),
            ("sdxl", "SmallCheckpoint", {"family": "sdxl"}),
        )
    },
    "flux": (
        {
            "flux": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
            "flux clip": ("SmallClip", {"family": "FLUX.1"}),
            "flux vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        },
        {"MODEL": ["flux", 0], "CLIP": ["flux clip", 0], "VAE": ["flux vae", 0]},
    ),
    "zimage": (
        {
            "zimage": ("SmallModel", {"family": "Z-Image"}),
            "zimage clip": ("SmallClip", {"family": "Z-Image"}),
            "flux vae": ("VAELoader", {"vae_name": "ae.safetensors"}),
        },
        {"MODEL": ["zimage", 0], "CLIP": ["zimage clip", 0], "VAE": ["flux vae", 0]},
    ),
}
# How often each is the model of a case.
WEIGHTS = {"toy": 10, "toy dit": 4, "sd15": 2, "sdxl": 2, "flux": 1, "zimage": 1}
UNETS = ("toy", "sd15", "sdxl")


def home_nodes(home: str) -> tuple[ApiPrompt, dict[str, Link]]:
    """The loaders of a home, and its links."""
    loaders, links = HOMES[home]
    return {name: {"class_type": kind, "inputs": dict(inputs)} for name, (kind, inputs) in loaders.items()}, links
