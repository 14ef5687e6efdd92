"""Small models of the host's transformer families with random weights.

Each begins with what the host detects in a released file of the family, so that its own table chooses the class; then
it is made as small as that class allows. What is detected is checked in `test_dit_models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_detection
import torch
from hosting.random_models import FLUX, SMALL_CONTEXT, Fill, fill, fill_shared, generator, model_of
from torch import Tensor

# The pooled output's width, as of the small U-Nets.
POOLED = 32
DEPTH = 2


@dataclass(frozen=True)
class Dit:
    """A family: `detected` is the configuration that the host detects, at full width but for the number of layers, and
    `small` what the small model has otherwise."""

    detected: dict[str, Any]
    small: dict[str, Any]
    fill_with: Fill = fill


_FLUX: dict[str, Any] = {
    **FLUX,
    "depth": DEPTH,
    "depth_single_blocks": DEPTH,
    "yak_mlp": False,
    "txt_norm": False,
}
_SMALL_FLUX: dict[str, Any] = {
    "hidden_size": 64,
    "context_in_dim": SMALL_CONTEXT,
    "num_heads": 4,
    "axes_dim": [4, 6, 6],
}
_CHROMA_ONLY = {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
_FLUX2: dict[str, Any] = {
    "vec_in_dim": None,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    # Klein 4B's, with the 4B Qwen3's three layers.
    "hidden_size": 3072,
    "context_in_dim": 7680,
    "mlp_ratio": 3.0,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "qkv_bias": False,
    "guidance_embed": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
_QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": DEPTH}
_SMALL_QWEN: dict[str, Any] = {
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": SMALL_CONTEXT,
    "axes_dims_rope": (4, 6, 6),
}
_LUMINA: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": DEPTH,
    "qk_norm": True,
    "n_heads": 24,
    "n_kv_heads": 8,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
_Z_IMAGE: dict[str, Any] = {
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_COSMOS: dict[str, Any] = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
_SMALL_COSMOS: dict[str, Any] = {
    "model_channels": 64,
    "crossattn_emb_channels": SMALL_CONTEXT,
    "adaln_lora_dim": 8,
    "num_blocks": DEPTH,
    "num_heads": 4,
}

DITS: dict[str, Dit] = {
    "FLUX.1": Dit(_FLUX, {**_SMALL_FLUX, "vec_in_dim": POOLED}),
    "FLUX.1 schnell": Dit({**_FLUX, "guidance_embed": False}, {**_SMALL_FLUX, "vec_in_dim": POOLED}),
    "Chroma": Dit(
        {k: v for k, v in _FLUX.items() if k not in ("guidance_embed", "yak_mlp", "txt_norm")}
        | {"image_model": "chroma", "vec_in_dim": None, **_CHROMA_ONLY},
        {**_SMALL_FLUX, "out_dim": 64, "hidden_dim": 48, "n_layers": DEPTH},
    ),
    "FLUX.2": Dit({**_FLUX, **_FLUX2}, {**_SMALL_FLUX, "num_heads": 2, "axes_dim": [8, 8, 8, 8]}),
    "Qwen-Image": Dit(_QWEN, _SMALL_QWEN),
    # Of 2511: what is given as a reference latent counts as free of noise.
    "Qwen-Image-Edit": Dit({**_QWEN, "default_ref_method": "index_timestep_zero"}, _SMALL_QWEN),
    "Lumina 2": Dit(
        _LUMINA,
        {"dim": 96, "cap_feat_dim": SMALL_CONTEXT, "n_heads": 6, "n_kv_heads": 2, "axes_dims": [4, 6, 6]}
        | {"ffn_dim_multiplier": 1.0, "multiple_of": 32},
    ),
    # The padding to 32 goes with widths of at least 256: the host's embedder of noise levels is as wide.
    "Z-Image": Dit(
        {**_LUMINA, **_Z_IMAGE},
        {"dim": 256, "cap_feat_dim": SMALL_CONTEXT, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12]}
        | {"ffn_dim_multiplier": 1.0, "multiple_of": 32},
    ),
    "SD 3.5": Dit(
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 24,
            "input_size": None,
            "adm_in_channels": 2048,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 1536},
            },
            "num_patches": 384 * 384,
            "pos_embed_max_size": 384,
            "qk_norm": "rms",
            "pos_embed_scaling_factor": None,
            "x_block_self_attn_layers": list(range(13)),
        },
        {
            "depth": DEPTH + 1,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": SMALL_CONTEXT, "out_features": 192},
            },
            "num_patches": 36 * 36,
            "pos_embed_max_size": 36,
            "x_block_self_attn_layers": [0, 1],
        },
    ),
    "HiDream": Dit(
        {
            "image_model": "hidream",
            "attention_head_dim": 128,
            "axes_dims_rope": [64, 32, 32],
            "caption_channels": [4096, 4096],
            "max_resolution": [128, 128],
            "in_channels": 16,
            "llama_layers": [*range(32), *[31] * 16],
            "num_attention_heads": 20,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "num_layers": 16,
            "num_single_layers": 32,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": 2048,
        },
        {
            "attention_head_dim": 16,
            "axes_dims_rope": [8, 4, 4],
            "caption_channels": [SMALL_CONTEXT, SMALL_CONTEXT],
            "llama_layers": list(range(2 * DEPTH)),
            "num_attention_heads": 4,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "num_layers": DEPTH,
            "num_single_layers": DEPTH,
            "text_emb_dim": POOLED,
        },
    ),
    "Krea 2": Dit(
        {
            "image_model": "krea2",
            "features": 6144,
            "channels": 16,
            "patch": 2,
            "layers": DEPTH,
            "heads": 48,
            "kvheads": 12,
            "txtlayers": 12,
            "txtdim": 2560,
        },
        {"features": 256, "tdim": 64, "heads": 4, "kvheads": 2, "multiplier": 2}
        | {"txtlayers": 3, "txtdim": SMALL_CONTEXT // 3, "txtheads": 2, "txtkvheads": 2},
    ),
    "Cosmos-Predict2": Dit(_COSMOS, _SMALL_COSMOS),
    # The adapter of its text encoder is of one size, of a hundred million weights.
    "Anima": Dit({**_COSMOS, "image_model": "anima"}, _SMALL_COSMOS, fill_with=fill_shared),
    "Wan": Dit(
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 1536,
            "out_dim": 16,
            "num_heads": 12,
            "ffn_dim": 8960,
            "num_layers": DEPTH,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "in_dim": 16,
        },
        {"dim": 96, "num_heads": 4, "ffn_dim": 128, "freq_dim": 32, "text_dim": SMALL_CONTEXT},
    ),
}


# Those that the pack knows.
PATCHED = tuple(name for name in DITS if name != "FLUX.1 schnell")


def description_of(name: str) -> Any:
    """The host's description of a released file of a family of `DITS`."""
    return comfy.model_detection.model_config_from_unet_config(DITS[name].detected, {})


def dit_model(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """The small MODEL of a family of `DITS`; `config` goes over its configuration."""
    dit = DITS[name]
    description = type(description_of(name))
    small = {**dit.detected, **dit.small, **config}
    model = model_of(description, small, seed=seed, dtype=dtype, fill_with=dit.fill_with)
    network = model.model.diffusion_model
    if name == "SD 3.5":
        # A buffer that the host leaves as it finds the memory, since a file has it.
        network.pos_embed.copy_(torch.randn(network.pos_embed.shape, generator=generator(seed)) / 4)
    return model


def second_context(model: Any, seed: int, length: int = 9) -> dict[str, Tensor]:
    """What a family reads of a prompt's dictionary besides the pooled output: HiDream's layers of Llama."""
    layers = model.model.model_config.unet_config.get("llama_layers", ())
    if not layers:
        return {}
    return {"conditioning_llama3": torch.randn(1, len(layers), length, SMALL_CONTEXT, generator=generator(seed))}
