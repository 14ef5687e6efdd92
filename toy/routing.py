"""How the toy's router is trained (AnyStory, section 3.4, second stage): see `train_router.py`, the command.

Scenes of one to three emblems (`groups.py`) are denoised with every emblem's reference shown where the router puts it.
The U-Net and the subject encoder stay as they are; the error of the noise and the error of the maps (Eq. 4) teach the
router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.router import RouterForm, RouterModules
from ..encoders.subject_encoder import SubjectModules, router_modules
from ..patches.families.unet import sites_of
from ..patches.parts.sites import Site
from ..training.router import WEIGHT, RoutedPass, Shown, intersection_over_union, routing_pass
from .groups import GroupBatch
from .lesson import Lesson
from .pairs import REFERENCE
from .subjects import FORM

ROUTER = RouterForm(width=64, heads=4)
# The timesteps of the measure.
LOGGED = (100, 400, 700, 900)
# The measure's layers: the last of each scale.
MEASURED = (Site("cross", "output", 1, 0), Site("cross", "output", 3, 0), Site("cross", "output", 5, 0))


def new_router(encoder: SubjectModules) -> RouterModules:
    """The router before its training."""
    return router_modules(ROUTER, FORM, encoder.cross, nn)


class Routing(Lesson):
    """How the toy's U-Net predicts with the subjects that an `encoder` has read where the router puts them."""

    def __init__(self, model: Any, vision: nn.Module, empty: Tensor, encoder: SubjectModules) -> None:
        super().__init__(model, vision, empty)
        self.encoder, self.order = encoder, sites_of(self.unet)
        with torch.no_grad():
            self.nothing = vision(torch.zeros(1, 3, REFERENCE, REFERENCE), intermediate_output=-2)[1].float()

    def predicted(
        self,
        router: RouterModules,
        batch: GroupBatch,
        noisy: Tensor,
        timestep: Tensor,
        precision: torch.dtype = torch.bfloat16,
    ) -> tuple[Tensor, RoutedPass]:
        """The U-Net's prediction, computed in a `precision`, and the pass with its maps."""
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            shown = Shown(batch.references, batch.mask, batch.seen, self.nothing, batch.present)
            routed = routing_pass(self.encoder, router, shown, self.order)
            with torch.no_grad():
                context = self.contexts(batch, torch.zeros(len(noisy), dtype=torch.bool))
            return self.called(noisy, timestep, context, routed.slots), routed

    def loss(self, modules: RouterModules, batch: GroupBatch) -> Tensor:
        """Eq. 1, weighted as in the first stage, and WEIGHT times Eq. 4."""
        timestep, noise = self.drawn_noise(batch)
        guess, routed = self.predicted(modules, batch, self.noised(batch.latents, noise, timestep), timestep)
        error = self.weighed(guess, noise, timestep, batch.inside)
        return error + WEIGHT * routed.loss(batch.emblems, batch.present)

    @torch.no_grad()
    def overlaps(
        self, modules: RouterModules, held_out: GroupBatch, at: int, sites: Sequence[Site] = MEASURED
    ) -> dict[Site, tuple[Tensor, Tensor]]:
        """How well the coarse and the refined maps fit the true masks at a timestep; see `intersection_over_union`."""
        generator = torch.Generator().manual_seed(at)
        noise = torch.randn(held_out.latents.shape, generator=generator)
        timestep = torch.full((len(noise),), at)
        noisy = self.noised(held_out.latents, noise, timestep)
        _, routed = self.predicted(modules, held_out, noisy, timestep)
        return intersection_over_union(routed.maps, held_out.emblems, held_out.present, sites)

    def told(self, modules: RouterModules, held_out: GroupBatch) -> str:
        """The overlap with the true masks, coarse and refined, of the last layer of each scale, the finest last."""
        parts = []
        for at in LOGGED:
            found = self.overlaps(modules, held_out, at).values()
            told = (f"{float(coarse.mean()):.2f}/{float(refined.mean()):.2f}" for coarse, refined in found)
            parts.append(f"at {at} {' '.join(told)}")
        return f"overlap, coarse/refined: {', '.join(parts)}"
