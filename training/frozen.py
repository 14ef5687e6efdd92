"""What stays as it is in a training of what shows subjects: a checkpoint's parts, a vision model, maybe an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ..encoders.segmented import segmented
from ..encoders.subject_encoder import SubjectEncoder
from ..patches.families import family_of
from ..patches.families.unet import UNet
from ..patches.parts.masks import resize_mask
from .copies import fingerprint
from .denoising import Denoiser
from .images import check_latents


class Frozen:
    """A private copy of a U-Net MODEL, its CLIP and VAE, a vision model (a CLIP_VISION), and for a router's training
    the subject encoder that it is for. `patchers` are to be loaded before use; `fingerprints` tell them apart by name,
    in whatever precision they are used.

    Raises ValueError where the MODEL is no U-Net."""

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        vision: Any,
        dtype: torch.dtype,
        checkpointing: bool = False,
        encoder: SubjectEncoder | None = None,
    ) -> None:
        family = family_of(model)
        if not isinstance(family, UNet):
            raise ValueError(f"This training is for U-Nets, but the model is {family.name}; take another checkpoint.")
        self.family, self.clip, self.vae, self.vision = family, clip, vae, vision
        self.encoder = encoder
        self.context = family.context_width(model)
        self.fingerprints = {
            "encoder": None if encoder is None else fingerprint(encoder.patcher),
            "checkpoint": fingerprint(model, clip.patcher),
            "VAE": fingerprint(vae.patcher),
            "vision model": fingerprint(vision.patcher),
        }
        self.denoiser = Denoiser(model, dtype, checkpointing)

    @property
    def network(self) -> nn.Module:
        return self.denoiser.patcher.model.diffusion_model

    @property
    def patchers(self) -> tuple[Any, ...]:
        beside = () if self.encoder is None else (self.encoder.patcher,)
        return (self.denoiser.patcher, self.vae.patcher, self.clip.patcher, self.vision.patcher, *beside)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def file(self) -> str:
        """The family as files are called."""
        return self.family.name.lower().replace(" ", "").replace(".", "")

    def _load_again(self) -> None:
        """Loads what trains where the host moved it away, to make room on a small GPU for the part that it loaded."""
        comfy.model_management.load_models_gpu([self.denoiser.patcher], force_full_load=True)

    @torch.no_grad()
    def prompts(self, captions: Sequence[str], apart: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context (n, tokens, width) and pooled output of captions, empty in rows (n, bool) that are `apart`; of
        prompts of several lengths what all of them have."""
        shown = ["" if alone else caption for caption, alone in zip(captions, apart.tolist(), strict=True)]
        made = [self.clip.encode_from_tokens(self.clip.tokenize(each), return_pooled=True) for each in shown]
        self._load_again()
        least = min(context.shape[1] for context, _ in made)
        context = torch.cat([context[:, :least] for context, _ in made]).to(self.device)
        pooled = [each for _, each in made if each is not None]
        return context, torch.cat(pooled).to(self.device) if pooled else None

    def pixels(self, pictures: Tensor, masks: Tensor) -> Tensor:
        """Pictures (n, height, width, 3) of 0 to 1, outside their masks (n, height, width) cut out, as the vision model
        takes them, on its device."""
        vision = self.vision
        found, _ = segmented(pictures, masks, vision.image_size, vision.image_mean, vision.image_std)
        return found.to(vision.load_device)

    @torch.no_grad()
    def seen(self, pixels: Tensor) -> Tensor:
        """What the vision model sees (n, tokens, channels) in `pixels` of pictures, before its last layer."""
        return self.vision.model(pixel_values=pixels, intermediate_output=-2)[1].to(self.device, torch.float32)

    @torch.no_grad()
    def cut_out(self, pictures: Tensor, masks: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """What a ReferenceNet reads of pictures (n, height, width, 3) of 0 to 1: the latents of what is inside their
        masks (n, height, width), `size` pixels wide, and the masks in these's cells."""
        found, inside = segmented(pictures, masks, size)
        latents = self.latents((found / 2 + 0.5).movedim(1, -1))
        return latents, resize_mask(inside, tuple(latents.shape[-2:])).to(self.device)

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (n, height, width, 3) of 0 to 1 in the model's latent space. Raises ValueError where the VAE is none
        of the model's kind."""
        latents = self.vae.encode(pictures)
        self._load_again()
        check_latents(latents, self.denoiser.patcher.model.latent_format.latent_channels)
        return self.denoiser.clean(latents)
