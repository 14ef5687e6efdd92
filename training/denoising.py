"""The denoising loss of a host MODEL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepBlock, forward_timestep_embed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..patches.families.unet import shown_whole
from .copies import private_copy


class Denoiser:
    """A private copy of a U-Net MODEL. `patcher` is what `loaded` takes; use it only in there.

    The model's weight patches (LoRA) act, patches of its attention do not. With `checkpointing` every block is computed
    again in the backward pass instead of kept: about a third more time for much less memory. With `as_v` the loss is
    that of v, whatever the model predicts."""

    def __init__(self, model: Any, dtype: torch.dtype, checkpointing: bool, as_v: bool = False) -> None:
        self.as_v = as_v
        self.patcher = private_copy(model)
        self.patcher.set_model_compute_dtype(dtype)
        patches = {"forward_timestep_embed_patch": [((TimestepBlock, SpatialTransformer), _checkpointed)]}
        # Of the host's attentions some have no backward pass.
        self.options = {"optimized_attention_override": _differentiable, "patches": patches if checkpointing else {}}

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device

    def loss(self, latents: Tensor, context: Tensor, pooled: Tensor | None, generator: torch.Generator) -> Tensor:
        """The mean square error of what the model predicts (its noise, or v) at noise levels drawn evenly from its
        schedule; Cones 2 Eq. 1 and 2. As v, an error of the noise counts (SNR + 1) / SNR times (Salimans and Ho 2022):
        of strong noise it is small in itself, though the picture's shapes and colours are decided there.

        `latents` (n, channels, h, w) are as the VAE gave them, `context` (n or 1, tokens, width), `pooled` (n or 1,
        width) where the family takes one. `generator` is on the CPU, so a seed gives the same noise on any device."""
        sigmas = self.levels(len(latents), generator)
        clean = self.clean(latents)
        noisy = self.noised(clean, sigmas, generator)
        return self.errors(self.denoised(noisy, sigmas, context, pooled), clean, sigmas).mean()

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """So many noise levels, drawn evenly from the model's schedule."""
        sigmas = self.patcher.model.model_sampling.sigmas
        return sigmas.to(self.device)[torch.randint(len(sigmas), (count,), generator=generator)]

    def clean(self, latents: Tensor) -> Tensor:
        """Latents as the VAE gave them, in the model's own latent space."""
        return self.patcher.model.process_latent_in(latents.float()).to(self.device)

    def noised(self, clean: Tensor, sigmas: Tensor, generator: torch.Generator) -> Tensor:
        """Clean latents with noise of these levels."""
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        return self.patcher.model.model_sampling.noise_scaling(sigmas, noise, clean)

    def denoised(
        self,
        noisy: Tensor,
        sigmas: Tensor,
        context: Tensor,
        pooled: Tensor | None,
        known: Tensor | None = None,
        **replaced: Mapping[Any, Any],
    ) -> Tensor:
        """The clean latents that the model predicts; `replaced` stands in the host's slots for its attentions. An
        inpainting U-Net is shown the clean latents `known` besides, all of them, else nothing of the picture."""
        options = {**self.options, **({"patches_replace": replaced} if replaced else {})}
        conditions = self._conditions(noisy, context, pooled, known)
        return self.patcher.model.apply_model(noisy, sigmas, transformer_options=options, **conditions)

    def errors(self, denoised: Tensor, clean: Tensor, sigmas: Tensor) -> Tensor:
        """The square error (n, channels, h, w) of what the model predicts."""
        # What the host gives is the clean picture, in which an error of the prediction is this many times as large.
        if self.as_v:
            spread = self.patcher.model.model_sampling.sigma_data
            unit = (sigmas * spread / (sigmas.square() + spread**2).sqrt())[:, None, None, None]
        else:
            sampling = self.patcher.model.model_sampling
            unit = sampling.calculate_denoised(sigmas, torch.ones_like(clean), torch.zeros_like(clean))
        return ((denoised.float() - clean) / unit).square()

    def _conditions(
        self, noise: Tensor, context: Tensor, pooled: Tensor | None, known: Tensor | None
    ) -> dict[str, Tensor]:
        """The conditioning as the host's own encoding of it gives it to the model."""
        entry: dict[str, Any] = {"cross_attn": context, "model_conds": {}}
        shown = {} if known is None else shown_whole(known)
        if pooled is not None:
            entry["pooled_output"] = pooled
        (encoded,) = comfy.samplers.encode_model_conds(
            self.patcher.model.extra_conds, [entry], noise, self.device, "positive",
            **{"latent_image": torch.zeros_like(noise), "denoise_mask": None, "seed": 0, **shown},
        )  # fmt: skip
        conditions = encoded["model_conds"].items()
        return {name: each.process_cond(batch_size=len(noise), area=None).cond for name, each in conditions}


def _differentiable(_function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return attention_pytorch(*args, **kwargs)


def _checkpointed(layer: Any, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any], *rest: Any) -> Tensor:
    # The host asks for it in place of the layer itself; without the patches it runs the layer.
    inside = {**options, "patches": {}}
    return checkpoint(
        forward_timestep_embed, (layer,), x, emb, context, inside, *rest, use_reentrant=False, preserve_rng_state=False
    )
