"""AnyLogo's tuning of a host MODEL of any U-Net family (Eq. 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..encoders.segmented import segmented
from ..encoders.semantic_injection import PROMPTS, MapsForm, layers_seen, metadata, tensors_of
from ..patches.families import family_of
from ..patches.families.unet import UNet, scales
from ..patches.masks import resize_mask, tokens_inside
from ..patches.semantic_injection import grouped
from ..patches.sites import Site, select_sites
from .denoising import Denoiser
from .samples import Sample
from .symbiotic import (
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

KEPT = PROMPTS[0]


class AnyLogoTuning:
    """Trains low-rank differences of a MODEL's transformers and the semantic tokens' maps; CLIP, VAE and the vision
    model (a CLIP_VISION, DINOv2) stay as they are. `delivering` is a choice of `select_sites`; with `through` gradients
    go through the reference's pass, too. `patchers` are to be loaded before use.

    Raises ValueError where the MODEL is no U-Net or the vision model no DINOv2."""

    name = "anylogo"

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        vision: Any,
        *,
        dtype: torch.dtype,
        checkpointing: bool = False,
        rank: int = 16,
        delivering: str = "decoder",
        keep: float = KEEP,
        through: bool = True,
    ) -> None:
        family = family_of(model)
        if not isinstance(family, UNet):
            raise ValueError(f"AnyLogo's tuning is for U-Nets, but this model is {family.name}; take another.")
        if getattr(vision, "model_type", "") != "dinov2":
            raise ValueError("AnyLogo's tuning reads a DINOv2; give the file of one as the vision model.")
        self.family, self.clip, self.vae, self.vision = family, clip, vae, vision
        self.denoiser = Denoiser(model, dtype, checkpointing)
        network = self.network
        every = family.sites(network)
        self.scales = scales(network)
        self.groups = grouped(every, self.scales)
        self.delivering = select_sites(every, "self", delivering)
        self.keep, self.through = keep, through
        width = family.context_width(model)
        self.form = MapsForm(width, vision.model.embed_dim, tuple(sorted(set(self.groups.values()))), KEPT)
        low_ranks = LowRanks(network, rank)
        semantic = SemanticModule(self.form.groups, self.form.features, width)
        self.modules = nn.ModuleDict({"low_ranks": low_ranks, "semantic": semantic})
        low_ranks.attach(network)

    @property
    def network(self) -> nn.Module:
        return self.denoiser.patcher.model.diffusion_model

    @property
    def patchers(self) -> tuple[Any, ...]:
        return (self.denoiser.patcher, self.vae.patcher, self.clip.patcher, self.vision.patcher)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    def groups_of_parameters(self, rate: float) -> list[dict[str, Any]]:
        """For an optimiser: the maps, which begin at nothing and harm nobody, learn ten times as fast."""
        return [
            {"params": list(self.modules["low_ranks"].parameters()), "lr": rate},
            {"params": list(self.modules["semantic"].parameters()), "lr": 10 * rate},
        ]

    @torch.no_grad()
    def _encoded(self, captions: Sequence[str], apart: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context (n, tokens, width) and pooled output of captions, empty in rows that are `apart`."""
        shown = ["" if alone else caption for caption, alone in zip(captions, apart.tolist(), strict=True)]
        made = [self.clip.encode_from_tokens(self.clip.tokenize(each), return_pooled=True) for each in shown]
        least = min(context.shape[1] for context, _ in made)
        context = torch.cat([context[:, :least] for context, _ in made]).to(self.device)
        pooled = [each for _, each in made if each is not None]
        return context, torch.cat(pooled).to(self.device) if pooled else None

    @torch.no_grad()
    def _seen(self, pictures: Tensor, masks: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        vision, device = self.vision, self.vision.load_device
        pixels = [
            segmented(picture[None], mask[None], vision.image_size, vision.image_mean, vision.image_std)[0]
            for picture, mask in zip(pictures, masks, strict=True)
        ]
        found = layers_seen(vision.model, torch.cat(pixels).to(device))
        return tuple((patches.to(self.device), whole.to(self.device)) for patches, whole in found)

    def loss(self, samples: Sequence[Sample], generator: torch.Generator) -> Tensor:
        """Eq. 6 over some samples; all chance comes from the generator, on the CPU."""
        pictures, masks = (torch.stack([getattr(each, name) for each in samples]) for name in ("picture", "mask"))
        subjects = torch.stack([each.subject for each in samples])
        inside = torch.stack([each.subject_mask for each in samples])
        rows = {name: each.to(self.device) for name, each in drawn_rows(len(samples), generator).items()}
        context, pooled = self._encoded([each.caption for each in samples], rows["unconditional"])
        with torch.no_grad():
            clean = self.denoiser.clean(self.vae.encode(pictures))
            reference = self.denoiser.clean(self.vae.encode(subjects))
        sigmas = self.denoiser.levels(len(samples), generator)
        noisy = self.denoiser.noised(clean, sigmas, generator)
        noisy_reference = self.denoiser.noised(reference, sigmas, generator)
        lent: dict[Site, KeysAndValues] = {}
        with torch.set_grad_enabled(self.through):
            self.denoiser.denoised(noisy_reference, sigmas, context, pooled, **recording(self.delivering, lent))
        kept = kept_layers(sorted(self.delivering), rows["reference"], self.keep, generator)
        cells = resize_mask(inside, tuple(reference.shape[-2:])).to(self.device)
        bias = {site: sparse_bias(tokens_inside(cells, self._grid(site, cells)), kept[site]) for site in lent}
        behind = [whole for _, whole in self._seen(pictures, 1 - masks)]
        tokens = self.modules["semantic"](self._seen(subjects, inside), behind)
        slots: Mapping[str, Any] = {
            **recycling(lent, bias),
            **telling(self.network, tokens, self.groups, rows["tokens"], rows["background"]),
        }
        return self.denoiser.errors(
            self.denoiser.denoised(noisy, sigmas, context, pooled, **slots), clean, sigmas
        ).mean()

    def _grid(self, site: Site, cells: Tensor) -> tuple[int, int]:
        times = self.scales[site.block, site.number]
        height, width = cells.shape[-2:]
        for _ in range(times):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    def write(self, modules: nn.ModuleDict, folder: Path) -> tuple[Path, Path]:
        """Writes the maps, for Load Semantic Injection, and the LoRA, for the host's; gives their paths."""
        name = self.family.name.lower().replace(" ", "").replace(".", "")
        maps, lora = folder / f"anylogo-{name}.safetensors", folder / f"anylogo-{name}-lora.safetensors"
        by = "python tools/train_subjects.py --kind anylogo"
        save_file(tensors_of(modules["semantic"].tensors()), maps, metadata(self.form, self.family.name, by))
        save_file(modules["low_ranks"].file(), lora, {"trained_by": by})
        return maps, lora
