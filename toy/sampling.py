"""Samples pictures with the toy in this process, through the host's own loader, sampler and VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import torch
from torch import Tensor

from . import dit_family, family
from .scenes import SIZE

CHECKPOINT = Path(__file__).parent / "weights" / "subject-patches-toy.safetensors"
DIT_CHECKPOINT = CHECKPOINT.with_name("subject-patches-toy-dit.safetensors")
NOISE_SHAPE = (8, SIZE // 8, SIZE // 8)


def noise_of(seeds: Sequence[int]) -> Tensor:
    """The noise (n, 8, 16, 16) that pictures of these seeds start from, each row of its seed alone."""
    return torch.stack([torch.randn(NOISE_SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True)
class Toy:
    """A toy as the host's checkpoint loader gives it. Sample and encode in inference mode, as the host's server does:
    outside it the autoencoder keeps what a gradient would need."""

    model: Any
    clip: Any
    vae: Any

    @classmethod
    def load(cls, checkpoint: Path = CHECKPOINT) -> Toy:
        family.register()
        dit_family.register()
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
        return cls(model, clip, vae)

    def encode(self, captions: Sequence[str]) -> list[Any]:
        """A CONDITIONING whose row i is caption i, as the host's own text encoding gives it."""
        found = [self.clip.encode_from_tokens_scheduled(self.clip.tokenize(caption))[0] for caption in captions]
        contexts, extras = zip(*found, strict=True)
        # The DiT takes the pooled vector too; the first toy leaves it.
        return [[torch.cat(contexts), {"pooled_output": torch.cat([e["pooled_output"] for e in extras])}]]

    @torch.inference_mode()
    def sample(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        model: Any = None,
        steps: int = 20,
        cfg: float = 4.0,
        sampler: str = "euler",
        latents: Tensor | None = None,
        noise_mask: Tensor | None = None,
    ) -> Tensor:
        """One picture for each caption: (n, 128, 128, 3) of 0 to 1. Row i starts from the noise of seed i alone.

        `model` is a patched one to use instead; `latents` (n, 8, 16, 16) and `noise_mask` (n, 128, 128) are an
        inpainting's start and the place it may change."""
        noise = noise_of(seeds)
        start = torch.zeros_like(noise) if latents is None else latents
        positive, negative = self.encode(captions), self.encode([""] * len(captions))
        samples = comfy.sample.sample(
            model or self.model, noise, steps, cfg, sampler, "normal", positive, negative, start,
            noise_mask=noise_mask, seed=seeds[0], disable_pbar=True,
        )  # fmt: skip
        return self.vae.decode(samples)[..., :3].clamp(0, 1)
