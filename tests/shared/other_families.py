"""Small models of families that the pack does not know."""

from __future__ import annotations

import comfy.supported_models
from hosting.random_models import SMALL, model_of

AURA = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "dim": 64,
    "n_layers": 2,
    "n_double_layers": 1,
    "n_heads": 4,
    "global_conddim": 64,
    "cond_seq_dim": 32,
    "max_seq": 64,
}
VIDEO = {
    **SMALL,
    "in_channels": 8,
    "model_channels": 64,
    "use_temporal_resblock": True,
    "use_temporal_attention": True,
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": [3, 1, 1],
}


OTHERS = {
    "AuraFlow": model_of(comfy.supported_models.AuraFlow, AURA),
    "SVD_img2vid": model_of(comfy.supported_models.SVD_img2vid, VIDEO),
}
