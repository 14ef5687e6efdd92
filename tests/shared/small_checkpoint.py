"""A loader of small checkpoints for a test's server: random weights, in the host's own classes of a real family."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.supported_models
import folder_paths
from clips import small_clip
from hosting.random_models import SMALL, model_of
from small_vaes import tiny_weights

WIDTH = 48
# What the host adds to an SDXL's pooled output: six numbers of 256 each.
SIX = 1536


class SmallCheckpoint:
    """A MODEL, a CLIP and a VAE that fit one another."""

    CATEGORY = "test"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802, the host's name
        return {"required": {"family": (["sd15", "sdxl"],)}}

    def load(self, family: str) -> tuple[Any, Any, Any]:
        """SDXL's context is both its encoders' side by side."""
        if family == "sd15":
            model = model_of(comfy.supported_models.SD15, {**SMALL, "context_dim": WIDTH})
            return model, _reading(small_clip("SD 1.x", hidden_size=WIDTH)), comfy.sd.VAE(sd=tiny_weights(4))
        config = {**SMALL, "model_channels": 64, "num_classes": "sequential", "context_dim": 2 * WIDTH}
        model = model_of(comfy.supported_models.SDXL, {**config, "adm_in_channels": SIX + WIDTH})
        return model, _reading(small_clip("SDXL", hidden_size=WIDTH)), comfy.sd.VAE(sd=tiny_weights(4))


def _reading(clip: Any) -> Any:
    """The CLIP as the host's loader gives it: it knows the folder of embeddings, which are as wide as it is."""
    for name in ("clip_l", "clip_g"):
        tokenizer = getattr(clip.tokenizer, name, None)
        if tokenizer is not None:
            tokenizer.embedding_directory = folder_paths.get_folder_paths("embeddings")
            tokenizer.embedding_size = WIDTH
    return clip
