"""Small vision models of the host's own classes."""

from __future__ import annotations

from typing import Any

import torch
from comfy.clip_vision import ClipVisionModel
from hosting.random_models import generator

# A SigLIP's channels, and its picture's side.
VISION, PICTURE = 12, 84
# A CLIP vision model's channels, and those of its projection.
WIDTH, PROJECTED = 32, 24
CLIP = {
    "model_type": "clip_vision_model",
    "num_hidden_layers": 2,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_act": "quick_gelu",
    "num_channels": 3,
    "patch_size": 16,
    "image_size": 48,
    "projection_dim": PROJECTED,
}


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


def random_weights(module: torch.nn.Module, seed: int) -> Any:
    """The module, with numbers of one spread in all its parameters."""
    source = generator(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source) * 0.3
    return module.eval()


def clip_vision(**sizes: int) -> ClipVisionModel:
    """A CLIP vision model of the host's, with random weights; `sizes` go over `CLIP`."""
    model = ClipVisionModel({**CLIP, **sizes})
    random_weights(model.model, 1)
    return model


def dinov2_sizes(
    features: int, layers: int, image: int, patch: int, mean: list[float], std: list[float]
) -> dict[str, Any]:
    """What the host and the pack's files say of a DINOv2."""
    sizes = {"image_size": image, "patch_size": patch, "hidden_size": features, "num_hidden_layers": layers}
    kind = {"model_type": "dinov2", "num_attention_heads": 2, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
    return {**kind, **sizes, "image_mean": mean, "image_std": std}


DINOV2 = dinov2_sizes(16, 8, 32, 8, [0.5] * 3, [0.5] * 3)


def dinov2(features: int = DINOV2["hidden_size"]) -> ClipVisionModel:
    """A DINOv2 of the host's, with random weights."""
    model = ClipVisionModel({**DINOV2, "hidden_size": features})
    source = generator(31)
    # Numbers that half precision has, too, as which the host may hold them.
    for parameter in model.model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=source) * 0.3).half().float()
    return model
