"""How the toy's U-Net is tuned to recycle (AnyLogo, Eq. 6): see `train_anylogo.py`, the command.

Of pairs of pictures of one emblem (`recycled_pairs.py`) one is to be denoised and the other lends. Low-rank differences
of the U-Net's transformers and the maps of the semantic tokens are trained; everything else is frozen. Some rows see
nothing of a reference, so that the U-Net stays what it was without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..encoders.semantic_injection import layers_seen
from ..patches.families.unet import UNETS, scales
from ..patches.masks import tokens_inside
from ..patches.semantic_injection import Hierarchy, grouped
from ..patches.sites import Site, select_sites
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
from .family import LATENT_CHANNELS, VISION, WIDTH
from .recycled_pairs import Batch
from .subjects import EMBLEM_WEIGHT, LOGGED
from .train_diffusion import SNR_CAP, alphas_cumprod, encode_text


class Tuning(nn.Module):
    """What is trained."""

    def __init__(self, unet: nn.Module, rank: int) -> None:
        super().__init__()
        groups = grouped(UNETS[0].sites(unet), scales(unet)).values()
        self.low_ranks = LowRanks(unet, rank)
        self.semantic = SemanticModule(groups, VISION["hidden_size"], WIDTH)


class Symbiosis:
    """The toy's frozen parts, and how a `Tuning` beside them predicts. `delivering` is a choice of `select_sites`, or
    "none" for semantic tokens alone; with `through` gradients go through the reference's pass, too."""

    def __init__(
        self, model: Any, vision: nn.Module, empty: Tensor, delivering: str = "decoder", keep: float = KEEP,
        through: bool = True,
    ) -> None:  # fmt: skip
        self.unet, self.text, self.vision, self.empty = model.unet.eval(), model.text.text_model, vision, empty
        self.schedule = alphas_cumprod(torch.device("cpu"))
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

    def noised(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        alpha = self.schedule[timestep].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def _called(self, noisy: Tensor, timestep: Tensor, context: Tensor, **slots: Any) -> Tensor:
        return self.unet(noisy, timestep, context=context, transformer_options={"patches_replace": slots})

    def plain(self, batch: Batch, noisy: Tensor, timestep: Tensor, precision: torch.dtype = torch.bfloat16) -> Tensor:
        """The U-Net's prediction by the caption alone."""
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            return self._called(noisy, timestep, encode_text(self.text, batch.tokens)).float()

    def predicted(
        self, tuning: Tuning, batch: Batch, noisy: Tensor, timestep: Tensor, noise: Tensor, rows: Mapping[str, Tensor],
        keep: float, precision: torch.dtype = torch.bfloat16,
    ) -> Tensor:  # fmt: skip
        """The tuned U-Net's prediction, `noise` being the reference's own. `rows` (n, bool) says which are of the pass
        without a prompt, and which of the others see `tokens`, the `reference`, and the `background`."""
        apart = rows["unconditional"]
        caption = torch.where(apart[:, None], self.empty, batch.tokens)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            with torch.no_grad():
                context = encode_text(self.text, caption)
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
            return self._called(noisy, timestep, context, **told, **recycling(lent, bias)).float()

    def _extracted(
        self, batch: Batch, timestep: Tensor, noise: Tensor, context: Tensor
    ) -> tuple[dict[Site, KeysAndValues], dict[Site, tuple[int, int]]]:
        lent: dict[Site, KeysAndValues] = {}
        noisy = self.noised(batch.references, noise, timestep)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.through):
            self._called(noisy, timestep, context, **recording(self.delivering, lent))
        times = {site: 2 ** scales(self.unet)[site.block, site.number] for site in lent}
        height, width = noisy.shape[-2:]
        return lent, {site: (-(-height // by), -(-width // by)) for site, by in times.items()}

    def loss(self, tuning: Tuning, batch: Batch) -> Tensor:
        """Eq. 6, weighted as the toy's own training weights it (see `train_diffusion.training_loss`), in and right
        beside the emblem EMBLEM_WEIGHT times as much as on the ground."""
        count = len(batch.latents)
        snr = self.schedule / (1 - self.schedule)
        weights = (snr + 1) / snr * snr.clamp(max=SNR_CAP) / snr
        timestep = torch.randint(len(self.schedule), (count,))
        noise = torch.randn_like(batch.latents)
        own = torch.randn_like(batch.references)
        rows = drawn_rows(count)
        noisy = self.noised(batch.latents, noise, timestep)
        with self.tuned(tuning):
            guess = self.predicted(tuning, batch, noisy, timestep, own, rows, self.keep)
        inside = functional.max_pool2d((batch.emblem[:, None] > 0.3).float(), 3, 1, 1)
        places = 1 + (EMBLEM_WEIGHT - 1) * inside
        error = (places / places.mean() * (guess - noise).square()).mean((1, 2, 3))
        return (weights[timestep] * error).mean() / weights.mean()

    @torch.no_grad()
    def falls(self, tuning: Tuning, held_out: Batch) -> dict[str, float]:
        """By how much the error of the noise differs from the untouched toy's without a reference, of held-out rows
        under the same noise, as a share: -0.08 is 8 % less. At LOGGED timesteps in the emblem with tokens, with the
        reference, and with both; and `blocked`, of the whole picture with neither, which must stay near zero."""
        count, found = len(held_out.latents), {}
        generator = torch.Generator().manual_seed(1)
        all_, none = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        inside = (held_out.emblem[:, None] > 0.3).float()
        for at in LOGGED:
            noise = torch.randn(held_out.latents.shape, generator=generator)
            own = torch.randn(held_out.references.shape, generator=generator)
            timestep = torch.full((count,), at)
            noisy = self.noised(held_out.latents, noise, timestep)

            def errors(guess: Tensor, noise: Tensor = noise) -> tuple[float, float]:
                error = (guess - noise).square()
                return float((error * inside).sum() / inside.sum() / LATENT_CHANNELS), float(error.mean())

            before = errors(self.plain(held_out, noisy, timestep))
            with self.tuned(tuning):
                for name, tokens, reference in (
                    ("tokens", all_, none), ("reference", none, all_), ("both", all_, all_), ("blocked", none, none)
                ):  # fmt: skip
                    rows = {"unconditional": none, "tokens": tokens, "reference": reference, "background": none}
                    after = errors(self.predicted(tuning, held_out, noisy, timestep, own, rows, 1.0))
                    whole = name == "blocked"
                    found[f"{name} at {at}"] = after[whole] / before[whole] - 1
        return found
