"""The first stage of AnyStory's training (section 3.4), for a host MODEL of any U-Net family: its subject encoder.

Trained are the ReferenceNet, the QFormer and the projections of both, by Eq. 1 with every subject shown at every place;
the U-Net, the VAE, the CLIP and the vision model stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ..encoders.reference_net import first_weights, shape_of
from ..encoders.subject_encoder import Form, SubjectModules
from ..patches.families.unet import layer_at
from ..patches.parts.masks import tokens_inside
from ..patches.parts.sites import Site
from .accelerated import Kind
from .encoder_file import write_encoder
from .frozen import Frozen
from .samples import Sample, decoded
from .symbiotic import KeysAndValues, Slots, attention, recycling, sparse_bias

# Shares of rows: those of the pass without a prompt, and of the others those without tokens (the paper drops the vision
# model's in a tenth) and without a reference, so that each part also works alone.
UNCONDITIONAL, NO_TOKENS, NO_REFERENCE = 0.1, 0.1, 0.15
# The paper's tokens of a subject; it does not say the QFormer's width and heads.
TOKENS, HEAD = 64, 64


class SubjectEncoderTraining(Kind):
    """Trains a subject encoder for a `frozen` checkpoint; `size` is the side in pixels of the picture that the
    ReferenceNet reads, `tokens` how many a subject gets."""

    name = "anystory"
    decode = staticmethod(decoded)

    def __init__(self, frozen: Frozen, size: int, tokens: int = TOKENS) -> None:
        self.frozen, self.settings = frozen, {"tokens": tokens}
        inner = frozen.denoiser.patcher.model
        if getattr(inner.latent_format, "latents_mean", None) is not None:
            raise ValueError(
                "This checkpoint's latents are shifted, not only scaled, which an encoder's file cannot say; take "
                "another checkpoint than one of Playground v2.5."
            )
        channels = inner.latent_format.latent_channels
        width = frozen.context
        self.form = Form(
            shape_of(inner.model_config.unet_config, channels), int(frozen.vision.config["hidden_size"]), tokens, width,
            max(width // HEAD, 1), size, float(inner.latent_format.scale_factor),
        )  # fmt: skip
        self.modules = SubjectModules(self.form, nn, comfy.ops.disable_weight_init)
        begin(self.modules, frozen.network, channels)

    def _seen(self, subjects: Tensor, masks: Tensor, apart: Tensor) -> Tensor:
        """What the vision model sees of subjects that are cut out; of rows that are `apart`, of an empty picture."""
        pixels = self.frozen.pixels(subjects, masks)
        return self.frozen.seen(pixels * (~apart).to(pixels).view(-1, 1, 1, 1))

    def loss(self, samples: Sequence[Sample], generator: torch.Generator) -> Tensor:
        """Eq. 1 over some samples; all chance comes from the generator, on the CPU."""
        frozen, count = self.frozen, len(samples)
        pictures = torch.stack([each.picture for each in samples])
        subjects = torch.stack([each.subject for each in samples])
        masks = torch.stack([each.subject_mask for each in samples])
        rows = {name: each.to(frozen.device) for name, each in drawn_rows(count, NO_TOKENS, generator).items()}
        context, pooled = frozen.prompts([each.caption for each in samples], rows["unconditional"])
        clean = frozen.latents(pictures)
        reference, inside = frozen.cut_out(subjects, masks, self.form.size)
        sigmas = frozen.denoiser.levels(count, generator)
        noisy = frozen.denoiser.noised(clean, sigmas, generator)
        seen = self._seen(subjects, masks, rows["unconditional"])
        slots = showing(self.modules, reference, inside, seen, rows)
        predicted = frozen.denoiser.denoised(noisy, sigmas, context, pooled, **slots)
        return frozen.denoiser.errors(predicted, clean, sigmas).mean()

    def write(self, modules: SubjectModules, folder: Path) -> tuple[Path, ...]:
        """Writes the encoder, for Load Subject Encoder; gives its path."""
        path = folder / f"anystory-{self.frozen.file}.safetensors"
        by = "python tools/train_subjects.py --kind anystory"
        write_encoder(path, modules, self.form, self.frozen.family.name, by)
        return (path,)


@torch.no_grad()
def begin(modules: SubjectModules, network: nn.Module, channels: int) -> None:
    """The modules before their training: what there is of the U-Net's own weights. The values of the tokens begin at
    zero, so that they begin as nothing."""
    modules.reference_net.load_state_dict(first_weights(network.state_dict(), channels))
    for site in modules.delivering:
        own = layer_at(network, site)
        modules.reference.at(site).to_k.weight.copy_(own.to_k.weight)
        modules.reference.at(site).to_v.weight.copy_(own.to_v.weight)
    for site in modules.cross:
        modules.image.at(site).to_k.weight.copy_(layer_at(network, site).to_k.weight)
        modules.image.at(site).to_v.weight.zero_()


def drawn_rows(count: int, no_tokens: float, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Which of `count` rows (bool) are of the pass without a prompt (`unconditional`), and which of the others see the
    `tokens`, all but this share of them, and the `reference`."""
    unconditional, tokenless, alone = (
        torch.rand(count, generator=generator) < share for share in (UNCONDITIONAL, no_tokens, NO_REFERENCE)
    )
    return {"unconditional": unconditional, "tokens": ~tokenless, "reference": ~alone}


def showing(
    modules: SubjectModules, latents: Tensor, inside: Tensor, features: Tensor, rows: Mapping[str, Tensor]
) -> Slots:
    """What stands in the host's slots with a subject shown at every place: there is no router in the first stage.

    `latents` (n, channels, h, w) are of the subjects cut out, `inside` (n, h, w) their masks, `features` (n, tokens,
    channels) what a vision model sees of them; `rows` are `drawn_rows`."""
    apart = rows["unconditional"]
    made = modules.references(latents, inside)
    lent = {site: (key, value) for site, (key, value, _) in made.items()}
    there = ~apart & rows["reference"]
    bias = {site: sparse_bias(tokens_inside(inside, grid), there) for site, (_, _, grid) in made.items()}
    return {**recycling(lent, bias), **adding(modules.prompts(features), apart | rows["tokens"])}


def adding(shown: dict[Site, KeysAndValues], rows: Tensor) -> Slots:
    """Eq. 5 without its maps: each cross-attention gets the attention to its keys and values in these `rows` (bool)."""

    def at(site: Site) -> Any:
        def add(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            key, value = (each.to(q) for each in shown[site])
            term = attention(q, key, value, extra["n_heads"]) * rows.to(q).view(-1, 1, 1)
            return attention(q, k, v, extra["n_heads"]) + term

        return add

    return {"attn2": {site.key: at(site) for site in shown}}
