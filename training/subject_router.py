"""The second stage of AnyStory's training (section 3.4), for a host MODEL of any U-Net family: its router.

The U-Net, the VAE, the CLIP, the vision model and the subject encoder of the first stage stay as they are. Pictures of
several subjects are denoised with each of them shown where the router puts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.router import RouterForm, RouterModules
from ..encoders.subject_encoder import SubjectEncoder, router_modules
from ..patches.families.unet import layer_at, sites_of
from .accelerated import Kind
from .encoder_file import write_with_router
from .frozen import Frozen
from .groups import Group, decoded_group
from .router import WEIGHT, RoutedPass, Shown, routing_pass, spread

# The paper does not say them.
FORM = RouterForm(width=256, heads=4)


class SubjectRouterTraining(Kind):
    """Trains a router for a `frozen` checkpoint with a subject encoder.

    Raises ValueError where the encoder was trained for another U-Net or another vision model."""

    name = "anystory-router"
    decode = staticmethod(decoded_group)
    settings: Mapping[str, Any] = {}

    def __init__(self, frozen: Frozen, form: RouterForm = FORM) -> None:
        if frozen.encoder is None:
            raise ValueError("A router is trained for a subject encoder; give the file of one.")
        self.frozen, self.form, self.encoder = frozen, form, frozen.encoder
        self.order = sites_of(frozen.network)
        check_fits(self.encoder, frozen)
        self.modules = router_modules(form, self.encoder.form, self.encoder.modules.cross, nn)

    def loss(self, samples: Sequence[Group], generator: torch.Generator) -> Tensor:
        """Eq. 1, and WEIGHT times Eq. 4, over some samples; all chance comes from the generator, on the CPU."""
        sigmas = self.frozen.denoiser.levels(len(samples), generator)
        error, routed, masks, present = self.routed(self.modules, samples, sigmas, generator)
        return error + WEIGHT * routed.loss(masks, present)

    def routed(
        self, modules: RouterModules, samples: Sequence[Group], sigmas: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, RoutedPass, Tensor, Tensor]:
        """A pass at these noise levels: Eq. 1's error, the pass with its maps, the true masks (rows, n, size, size),
        and of which of its n subjects (rows, n) a row has."""
        frozen, denoiser = self.frozen, self.frozen.denoiser
        captions = [each.caption for each in samples]
        context, pooled = frozen.prompts(captions, torch.zeros(len(captions), dtype=torch.bool))
        clean = frozen.latents(torch.stack([each.picture for each in samples]))
        noisy = denoiser.noised(clean, sigmas, generator)
        shown = self._shown(samples)
        routed = routing_pass(self.encoder.modules, modules, shown, self.order, generator)
        predicted = denoiser.denoised(noisy, sigmas, context, pooled, **routed.slots)
        masks = spread(torch.cat([each.masks for each in samples]).to(frozen.device), shown.present)
        return denoiser.errors(predicted, clean, sigmas).mean(), routed, masks, shown.present

    def _shown(self, samples: Sequence[Group]) -> Shown:
        """The subjects of all samples, encoded."""
        frozen = self.frozen
        counts = torch.tensor([len(each.masks) for each in samples])
        present = (torch.arange(int(counts.max())) < counts[:, None]).to(frozen.device)
        subjects = torch.cat([each.subjects for each in samples])
        masks = torch.cat([each.subject_masks for each in samples])
        latents, inside = frozen.cut_out(subjects, masks, self.encoder.form.size)
        pixels = frozen.pixels(subjects, masks)
        seen = frozen.seen(torch.cat([pixels, torch.zeros_like(pixels[:1])]))
        latents, inside, features = (spread(each, present) for each in (latents, inside, seen[:-1]))
        return Shown(latents, inside, features, seen[-1:], present)

    def write(self, modules: RouterModules, folder: Path) -> tuple[Path, ...]:
        """Writes the encoder with the router, for Load Subject Encoder; gives its path."""
        path = folder / f"anystory-{self.frozen.file}.safetensors"
        by = "python tools/train_subjects.py --kind anystory, --stage 1 and --stage 2"
        write_with_router(path, self.encoder, modules, self.form, by)
        return (path,)


def check_fits(encoder: SubjectEncoder, frozen: Frozen) -> None:
    """Raises ValueError where an encoder was trained for another U-Net or another vision model."""
    form, channels = encoder.form, frozen.denoiser.patcher.model.latent_format.latent_channels
    cross = {
        site: layer_at(frozen.network, site).to_k.weight.shape[0]
        for site in sites_of(frozen.network)
        if site.kind == "cross"
    }
    ours = (cross, frozen.context, channels)
    if ours != (encoder.modules.cross, form.context, form.latent_channels):
        raise ValueError(
            f"The encoder '{encoder.name}' is for another U-Net, of {encoder.family}, than the checkpoint's, of "
            f"{frozen.family.name}; give the encoder that the first stage trained for this checkpoint."
        )
    encoder.check_vision(int(frozen.vision.config["hidden_size"]))
