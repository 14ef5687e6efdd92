"""How the toy's U-Net is tuned to recycle (AnyLogo, Eq. 6): see `train_anylogo.py`, the command.

Of pairs of pictures of one emblem (`pairs.py`) one is to be denoised and the other lends. Low-rank differences of the
U-Net's transformers and the maps of the semantic tokens are trained; everything else is frozen. Some rows see nothing
of a reference, so that the U-Net stays what it was without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders.semantic_injection import layers_seen
from ..patches.families.unet import UNETS, scales
from ..patches.mechanisms.semantic_injection import grouped
from ..patches.parts.sites import select_sites
from ..training import symbiotic
from ..training.symbiotic import KEEP, Passes, Slots, drawn_rows
from .family import VISION, WIDTH
from .lesson import BLOCKED, PairLesson
from .pairs import Batch
from .train_diffusion import encode_text


class Tuning(symbiotic.Tuning):
    """What is trained, of the toy's sizes."""

    def __init__(self, unet: nn.Module, rank: int) -> None:
        groups = grouped(UNETS[0].sites(unet), scales(unet)).values()
        super().__init__(unet, rank, groups, VISION["hidden_size"], WIDTH)


class Symbiosis(PairLesson):
    """How the toy's U-Net predicts with a `Tuning` (Eq. 6). `delivering` is a choice of `select_sites`, or
    "none" for semantic tokens alone; with `through` gradients go through the reference's pass, too."""

    def __init__(
        self, model: Any, vision: nn.Module, empty: Tensor, delivering: str = "decoder", keep: float = KEEP,
        through: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model, vision, empty)
        every = UNETS[0].sites(self.unet)
        lending = () if delivering == "none" else select_sites(every, "self", delivering)
        self.passes, self.keep = Passes(self.unet, every, lending, through), keep

    @contextmanager
    def tuned(self, tuning: Tuning) -> Iterator[None]:
        """The U-Net with the low-rank differences of a `Tuning`."""
        handles = tuning.low_ranks.attach(self.unet)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def plain(self, batch: Batch, noisy: Tensor, timestep: Tensor, precision: torch.dtype = torch.bfloat16) -> Tensor:
        """The U-Net's prediction by the caption alone."""
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            return self.called(noisy, timestep, encode_text(self.text, batch.tokens), {})

    def predicted(
        self, tuning: Tuning, batch: Batch, noisy: Tensor, timestep: Tensor, noise: Tensor, rows: Mapping[str, Tensor],
        keep: float, precision: torch.dtype = torch.bfloat16,
    ) -> Tensor:  # fmt: skip
        """The tuned U-Net's prediction, `noise` being the reference's own. `rows` (n, bool) says which are of the pass
        without a prompt, and which of the others see `tokens`, the `reference`, and the `background`."""
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            with torch.no_grad():
                context = self.contexts(batch, rows["unconditional"])
                seen = layers_seen(self.vision, batch.pixels)
                behind = [whole for _, whole in layers_seen(self.vision, batch.grounds)]

            def extract(slots: Slots) -> None:
                self.called(self.noised(batch.references, noise, timestep), timestep, context, slots)

            slots = self.passes.slots(tuning.semantic, extract, seen, behind, batch.mask, rows, keep)
            return self.called(noisy, timestep, context, slots)

    def guess(self, modules: Tuning, batch: Batch, noisy: Tensor, timestep: Tensor) -> Tensor:
        own = torch.randn_like(batch.references)
        rows = drawn_rows(len(noisy))
        with self.tuned(modules):
            return self.predicted(modules, batch, noisy, timestep, own, rows, self.keep)

    def guesses(
        self, modules: Tuning, batch: Batch, noisy: Tensor, timestep: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The untouched toy's without a reference; with tokens, reference, and both; and with neither, which must stay
        what the untouched toy's is."""
        own = torch.randn(batch.references.shape, generator=generator)
        all_, none = (torch.full((len(noisy),), each) for each in (True, False))
        shown = {"tokens": (all_, none), "reference": (none, all_), "both": (all_, all_), BLOCKED: (none, none)}
        found = {"untouched": self.plain(batch, noisy, timestep)}
        with self.tuned(modules):
            for name, (tokens, reference) in shown.items():
                rows = {"unconditional": none, "tokens": tokens, "reference": reference, "background": none}
                found[name] = self.predicted(modules, batch, noisy, timestep, own, rows, 1.0)
        return found
