"""MODELs of the host's own families with random weights: what tests and measurements of cost need, and no download.

Import it after `use_cpu_without_gpu`: it imports the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import RMSNorm
from comfy.model_patcher import CoreModelPatcher
from torch import Tensor

SMALL_CONTEXT = 48
# An SD 1.x U-Net in all but size: 7 self-attentions, 5 of them in the middle and the decoder.
SMALL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": SMALL_CONTEXT,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
# Of one scale, for what does not depend on how deep a model is.
TINY: dict[str, Any] = {
    **SMALL,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
}
SD: dict[str, Any] = {
    **SMALL,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}
SDXL: dict[str, Any] = {
    **SMALL,
    "model_channels": 320,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
}
# FLUX.1's shape in all but depth: as many single blocks to a double one.
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "hidden_size": 3072,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
# A quarter as wide: over a quarter of the tokens, attention is the same share of its work.
FLUX_QUARTER = {**FLUX, "hidden_size": 768, "num_heads": 6}
Fill = Callable[[torch.nn.Module, int], None]
# A norm of the host that is none of these keeps its weight as the distance from 1.
_NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm, RMSNorm)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(network: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations at about unit size; norms pass through, biases are zero."""
    source = generator(seed)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            value = torch.randn(parameter.shape, generator=source) / parameter[0].numel() ** 0.5
        else:
            value = torch.zeros(parameter.shape)
        parameter.data.copy_(value)
    _open_norms(network)


def fill_shared(network: torch.nn.Module, seed: int) -> None:
    """Like `fill`, but layers with the same number of inputs share one buffer, which makes a big model cheap."""
    sizes: dict[int, int] = {}
    for parameter in network.parameters():
        inputs = parameter[0].numel() if parameter.ndim > 1 else 0
        sizes[inputs] = max(sizes.get(inputs, 0), parameter.numel())
    dtype = next(network.parameters()).dtype
    noise = torch.randn(2**20, generator=generator(seed))
    buffers = {}
    for inputs, size in sizes.items():
        scaled = (noise / max(inputs, 1) ** 0.5 if inputs else torch.zeros_like(noise)).to(dtype)
        buffers[inputs] = scaled.repeat(-(-size // len(scaled)))[:size]
    for parameter in network.parameters():
        inputs = parameter[0].numel() if parameter.ndim > 1 else 0
        parameter.data = buffers[inputs][: parameter.numel()].view(parameter.shape)
    _open_norms(network)


def _open_norms(network: torch.nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, _NORMS) and module.weight is not None:
            # A tensor of its own: it may have been a view of what layers share.
            module.weight.data = torch.ones_like(module.weight)


def model_of(
    family: Any,
    config: dict[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
    hints: dict[str, Tensor] | None = None,
    fill_with: Fill = fill,
) -> Any:
    """A MODEL of a family of the host. Weights are kept in `dtype`; `compute` is the host's manual cast. `hints` are
    the weights that the family's class looks at to tell its variants apart."""
    device = comfy.model_management.get_torch_device()
    description = family({**config})
    description.set_inference_dtype(dtype, compute, device=device)
    network = description.get_model(hints or {}, "")
    fill_with(network.diffusion_model, seed)
    return CoreModelPatcher(network, device, comfy.model_management.unet_offload_device())
