"""Small CLIPs of the host's own families, made in inference mode as the host makes them."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.sd2_clip as sd2_clip
import torch
from comfy.supported_models_base import ClipTarget
from hosting.random_models import generator

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
# The host's names of the settings that each encoder of a family looks for, and its classes.
FAMILIES: dict[str, tuple[type, type, tuple[str, ...]]] = {
    "SD 1.x": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel, ("clip_l",)),
    "SD 2.x": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel, ("clip_h",)),
    "SDXL": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel, ("clip_l", "clip_g")),
}


@torch.inference_mode()
def small_clip(family: str, seed: int = 0, **config: int) -> Any:
    """A CLIP with an encoder of random weights, or two of one width; `config` goes over SMALL."""
    tokenizer, model, names = FAMILIES[family]
    options: dict[str, Any] = {f"{name}_model_config": {**SMALL, **config} for name in names}
    clip = comfy.sd.CLIP(ClipTarget(tokenizer, model), model_options=options)
    source = generator(seed)
    for name, weight in clip.cond_stage_model.named_parameters():
        weight.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2, generator=source)
    return clip
