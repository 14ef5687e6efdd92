"""The second toy as a model family of the host: a small FLUX, known to its checkpoint loader.

It can only match a FLUX of 192 channels over a 64 wide context, which no published checkpoint has. Its weights are the
host's `Flux`; its words are the first toy's, in 24 tokens; its autoencoder is the first toy's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch

from .family import LATENT_CHANNELS, TEXT, WIDTH, ToyLatents

HIDDEN = 192
# The longest caption of the small world has 24 tokens with its start and end: every context has one length.
TOKENS = 24

FLUX: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "vec_in_dim": WIDTH,
    "context_in_dim": WIDTH,
    "hidden_size": HIDDEN,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 6,
    "axes_dim": [8, 20, 20],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
DIT_TEXT: dict[str, Any] = {**TEXT, "max_position_embeddings": TOKENS}

TABLE = "clip_l.transformer.text_model.embeddings.token_embedding.weight"
IDS = "clip_l.word_ids"


def whole_table(rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """CLIP's table of 49,408 words with these rows at these ids, zero elsewhere: the checkpoint keeps only the words
    that captions use."""
    table = rows.new_zeros(TEXT["eos_token_id"] + 1, rows.shape[1])
    table[ids.long()] = rows
    return table


class DitWordTokenizer(comfy.sd1_clip.SDTokenizer):
    """The host's CLIP tokenizer, in pieces of TOKENS."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(
            max_length=TOKENS,
            embedding_directory=embedding_directory,
            embedding_size=WIDTH,
            tokenizer_data=tokenizer_data or {},
        )


class DitTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """Stable Diffusion 1's tokenizer for the DiT's text encoder."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=DitWordTokenizer)


class DitTextEncoder(comfy.sd1_clip.SDClipModel):
    """A CLIP text encoder of four layers, 64 wide, for TOKENS tokens; the pooled vector is its last word's."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=TOKENS,
            textmodel_json_config=dict(DIT_TEXT),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class DitClip(comfy.sd1_clip.SD1ClipModel):
    """Stable Diffusion 1's text model with the DiT's encoder in it."""

    def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=DitTextEncoder)


class ToyDit(comfy.supported_models.Flux):
    """The host's description of the DiT's checkpoint."""

    unet_config: ClassVar[dict[str, Any]] = {
        "image_model": "flux",
        "guidance_embed": False,
        "hidden_size": HIDDEN,
        "in_channels": LATENT_CHANNELS,
        "context_in_dim": WIDTH,
        "vec_in_dim": WIDTH,
    }
    # What the host takes for granted of every FLUX.
    unet_extra_config: ClassVar[dict[str, Any]] = {
        name: FLUX[name] for name in ("out_channels", "num_heads", "axes_dim")
    }
    sampling_settings: ClassVar[dict[str, Any]] = {"shift": 0.7}
    latent_format = ToyLatents

    def process_clip_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = super().process_clip_state_dict(state_dict)
        ids = found.pop(IDS, None)
        if ids is not None:
            found[TABLE] = whole_table(found[TABLE], ids)
        return found

    def clip_target(self, state_dict: Any = None) -> comfy.supported_models_base.ClipTarget:
        return comfy.supported_models_base.ClipTarget(DitTokenizer, DitClip)


def register() -> None:
    """Makes the host's checkpoint loader know the DiT. Calling it again changes nothing."""
    families = comfy.supported_models.models
    if not any(family.__name__ == ToyDit.__name__ for family in families):
        # Before the host's own: its FLUX without guidance takes every other.
        families.insert(0, ToyDit)
