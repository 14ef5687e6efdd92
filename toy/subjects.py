"""How the toy's subject encoder is trained (AnyStory, section 3.4, first stage): see `train_subjects.py`, the command.

Of pairs of pictures of one emblem (`pairs.py`) one is to be denoised and the other shown. The U-Net is frozen; what is
trained is the ReferenceNet, the QFormer and the projections of both. One row in ten learns the unconditional pass: no
caption, no reference, and the tokens of an empty picture. Tokens or reference are left out of further rows, so that
each also works alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.reference_net import shape_of
from ..encoders.subject_encoder import Form, SubjectModules
from ..training.subject_encoder import begin, drawn_rows, showing
from .family import LATENT_CHANNELS, UNET, VISION
from .lesson import PairLesson
from .pairs import REFERENCE, Batch

# As many rows see no tokens as no reference.
NO_TOKENS = 0.15
FORM = Form(
    shape_of(UNET, LATENT_CHANNELS), VISION["hidden_size"], tokens=8, width=64, heads=4, size=REFERENCE, scale=1.0
)


def encoder_modules(unet: nn.Module) -> SubjectModules:
    """The modules before their training; see `begin`."""
    from comfy.ops import disable_weight_init

    modules = SubjectModules(FORM, nn, disable_weight_init)
    begin(modules, unet, LATENT_CHANNELS)
    return modules


class Stage(PairLesson):
    """How the toy's U-Net predicts with a subject shown at every place: there is no router in the first stage."""

    def __init__(self, model: Any, vision: nn.Module, empty: Tensor) -> None:
        super().__init__(model, vision, empty)
        with torch.no_grad():
            self.nothing = vision(torch.zeros(1, 3, REFERENCE, REFERENCE), intermediate_output=-2)[1]

    def prediction(
        self,
        modules: SubjectModules,
        batch: Batch,
        noisy: Tensor,
        timestep: Tensor,
        rows: Mapping[str, Tensor],
        precision: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """The U-Net's prediction, computed in a `precision`. `rows` says of which rows (n, bool) the pass is
        `unconditional`, and of which further ones the `tokens` and the `reference` are there."""
        apart = rows["unconditional"]
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            with torch.no_grad():
                context = self.contexts(batch, apart)
                seen = self.vision(batch.pixels, intermediate_output=-2)[1].float()
                seen = torch.where(apart[:, None, None], self.nothing, seen)
            slots = showing(modules, batch.references, batch.mask, seen, rows)
            return self.called(noisy, timestep, context, slots)

    def guess(self, modules: SubjectModules, batch: Batch, noisy: Tensor, timestep: Tensor) -> Tensor:
        return self.prediction(modules, batch, noisy, timestep, drawn_rows(len(noisy), NO_TOKENS))

    def guesses(
        self, modules: SubjectModules, batch: Batch, noisy: Tensor, timestep: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """With nothing shown, and with tokens, reference, and both."""
        all_, none = (torch.full((len(noisy),), each) for each in (True, False))
        shown = {"nothing": (none, none), "tokens": (all_, none), "reference": (none, all_), "both": (all_, all_)}
        return {
            name: self.prediction(
                modules, batch, noisy, timestep, {"unconditional": none, "tokens": tokens, "reference": reference}
            )
            for name, (tokens, reference) in shown.items()
        }
