"""The toy as a model family of the host: a small Stable Diffusion, known to its checkpoint loader.

`register` adds one description to the host's list of model families, which is how a family becomes known
there. It can only match a U-Net of 64 channels over a 64 wide context, which no published checkpoint has.
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.latent_formats
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base

LATENT_CHANNELS = 8
WIDTH = 64

UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": WIDTH,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [1, 1, 1],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": WIDTH,
    "num_heads": 4,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}

TEXT: dict[str, Any] = {
    "bos_token_id": 0,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": 77,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}

# The toy's vision model, of the host's DINOv2: what it sees, 96 pixels squared of -1 to 1, is an emblem's size.
VISION: dict[str, Any] = {
    "model_type": "dinov2",
    "image_size": 96,
    "patch_size": 8,
    "hidden_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


class ToyLatents(comfy.latent_formats.LatentFormat):
    """Latents of unit variance: the autoencoder's own scale is part of the checkpoint."""

    latent_channels = LATENT_CHANNELS


class ToyWordTokenizer(comfy.sd1_clip.SDTokenizer):
    """The host's CLIP tokenizer, with textual embeddings of the toy's width."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            embedding_directory=embedding_directory, embedding_size=WIDTH, tokenizer_data=tokenizer_data or {}
        )


class ToyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """Stable Diffusion 1's tokenizer for the toy's text encoder."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=ToyWordTokenizer)


class ToyTextEncoder(comfy.sd1_clip.SDClipModel):
    """A CLIP text encoder of four layers, 64 wide."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(TEXT),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class ToyClip(comfy.sd1_clip.SD1ClipModel):
    """Stable Diffusion 1's text model with the toy's encoder in it."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=ToyTextEncoder)


class ToyDiffusion(comfy.supported_models.SD15):
    """The host's description of the toy checkpoint."""

    unet_config: ClassVar[dict[str, Any]] = {
        "context_dim": WIDTH,
        "model_channels": WIDTH,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "out_channels": LATENT_CHANNELS,
        "channel_mult": UNET["channel_mult"],
    }
    unet_extra_config: ClassVar[dict[str, Any]] = {"num_heads": UNET["num_heads"], "num_head_channels": -1}
    latent_format = ToyLatents

    def inpaint_model(self) -> bool:
        return self.unet_config["in_channels"] > LATENT_CHANNELS

    def clip_target(self, state_dict: Any = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(ToyTokenizer, ToyClip)


def register() -> None:
    """Makes the host's checkpoint loader know the toy. Calling it again changes nothing."""
    families = comfy.supported_models.models
    if not any(family.__name__ == ToyDiffusion.__name__ for family in families):
        families.append(ToyDiffusion)
