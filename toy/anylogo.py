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
from ..patches.mechanisms.semantic_injection import Hierarchy, grouped
from ..patches.parts.masks import tokens_inside
from ..patches.parts.sites import Site, select_sites
from ..training.symbiotic import (
    KEEP,
    KeysAndValues,
    LowRanks,
    SemanticModule,
    drawn_rows,
    kept_layers,
    recording,
    recycling,
    sparse_bias,
    telling,
)
from .family import VISION, WIDTH
from .lesson import BLOCKED, Lesson
from .pairs import Batch
from .train_diffusion import encode_text


class Tuning(nn.Module):
    """What is trained."""

    def __init__(self, unet: nn.Module, rank: int) -> None:
        super().__init__()
        groups = grouped(UNETS[0].sites(unet), scales(unet)).values()
        self.low_ranks = LowRanks(unet, rank)
        self.semantic = SemanticModule(groups, VISION["hidden_size"], WIDTH)


class Symbiosis(Lesson):
    """How the toy's U-Net predicts with a `Tuning` (Eq. 6). `delivering` is a choice of `select_sites`, or
    "none" for semantic tokens alone; with `through` gradients go through the reference's pass, too."""

    def __init__(
        self, model: Any, vision: nn.Module, empty: Tensor, delivering: str = "decoder", keep: float = KEEP,
        through: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(model, vision, empty)
        every = UNETS[0].sites(self.unet)
        self.groups = grouped(every, scales(self.unet))
        self.delivering = frozenset() if delivering == "none" else select_sites(every, "self", delivering)
        self.keep, self.through = keep, through

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
                seen: Hierarchy = layers_seen(self.vision, batch.pixels)
                behind = [whole for _, whole in layers_seen(self.vision, batch.grounds)]
            tokens = tuning.semantic(seen, behind)
            told = telling(self.unet, tokens, self.groups, rows["tokens"], rows["background"])
            lent: dict[Site, KeysAndValues] = {}
            bias: dict[Site, Tensor] = {}
            if self.delivering:
                lent, grids = self._extracted(batch, timestep, noise, context)
                kept = kept_layers(sorted(lent), rows["reference"], keep)
                for site, grid in grids.items():
                    bias[site] = sparse_bias(tokens_inside(batch.mask, grid), kept[site])
            return self.called(noisy, timestep, context, {**told, **recycling(lent, bias)})

    def _extracted(
        self, batch: Batch, timestep: Tensor, noise: Tensor, context: Tensor
    ) -> tuple[dict[Site, KeysAndValues], dict[Site, tuple[int, int]]]:
        lent: dict[Site, KeysAndValues] = {}
        noisy = self.noised(batch.references, noise, timestep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.through):
            self.called(noisy, timestep, context, recording(self.delivering, lent))
        times = {site: 2 ** scales(self.unet)[site.block, site.number] for site in lent}
        height, width = noisy.shape[-2:]
        return lent, {site: (-(-height // by), -(-width // by)) for site, by in times.items()}

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
