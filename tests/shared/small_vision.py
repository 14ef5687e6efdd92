"""Small vision models of the host's own classes."""

from __future__ import annotations

from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel
from hosting.random_models import generator

# Its channels, and its picture's side.
VISION, PICTURE = 12, 84


def siglip(width: int = VISION, image: int = PICTURE) -> ClipVisionModel:
    """A SigLIP of the host's, with random weights."""
    model = ClipVisionModel(
        {
            "model_type": "siglip_vision_model",
            "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": width,
            "image_size": image,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    )
    for number, parameter in enumerate(model.model.parameters()):
        value = torch.randn(parameter.shape, generator=generator(number))
        parameter.data = value / max(parameter[0].numel(), 4) ** 0.5
    return model


def dinov2_sizes(
    features: int, layers: int, image: int, patch: int, mean: list[float], std: list[float]
) -> dict[str, Any]:
    """What the host and the pack's files say of a DINOv2."""
    sizes = {"image_size": image, "patch_size": patch, "hidden_size": features, "num_hidden_layers": layers}
    kind = {"model_type": "dinov2", "num_attention_heads": 2, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
    return {**kind, **sizes, "image_mean": mean, "image_std": std}
