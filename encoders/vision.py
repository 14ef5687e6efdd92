"""The host's vision models: those that a subject encoder's own file brings, and what one sees of a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .weights import check_shapes, shapes_of

# What the host's class of a vision model wants to be told, of the kinds that a file may bring.
KINDS = ("dinov2",)


def vision_model(config: str, tensors: Mapping[str, Tensor], prefix: str) -> Any:
    """The host's vision model (its CLIP_VISION) of a `config` in JSON, as the host's own are written, with the given
    weights, before whose names their file writes `prefix`. The host's loader knows published sizes alone.

    Raises ValueError with a phrase where the config is none or the weights are not those of it."""
    from comfy.clip_vision import ClipVisionModel

    try:
        told = json.loads(config)
        if told["model_type"] not in KINDS:
            raise ValueError(f"the kind '{told['model_type']}'")
        if told["image_size"] % told["patch_size"]:
            raise ValueError(f"patches of {told['patch_size']} in {told['image_size']} pixels")
        model = ClipVisionModel(told)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"what it says of its vision model is not whole ({error})") from error
    check_shapes(shapes_of(model.model.state_dict()), shapes_of(tensors), prefix)
    model.load_sd({name: tensor.to(model.dtype) for name, tensor in tensors.items()})
    return model


def seen(vision: Any, pixels: Tensor) -> Tensor:
    """A vision model's hidden states before its last layer (rows, n, channels), float32 on the CPU, of `pixels` (rows,
    3, height, width) that are normalised for it; see `segmented.py`."""
    import comfy.model_management

    comfy.model_management.load_model_gpu(vision.patcher)
    with torch.inference_mode():
        given = pixels.to(vision.load_device, torch.float32)
        return vision.model(pixel_values=given, intermediate_output=-2)[1].float().cpu()
