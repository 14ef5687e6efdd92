"""AnyLogo's tuning of a host MODEL of any U-Net family (Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders.semantic_injection import PROMPTS, MapsForm, layers_seen, tensors_of
from ..encoders.weights import metadata
from ..patches.parts.masks import resize_mask
from ..patches.parts.sites import select_sites
from .accelerated import Kind
from .files import save_whole
from .frozen import Frozen
from .samples import Sample, decoded
from .symbiotic import KEEP, MAPS_TIMES, Passes, Slots, Tuning, drawn_rows

KEPT = PROMPTS[0]


class AnyLogoTuning(Kind):
    """Trains low-rank differences of a `frozen` checkpoint's transformers, and the semantic tokens' maps. `delivering`
    is a choice of `select_sites`; with `through` gradients go through the reference's pass, too.

    Raises ValueError where the vision model is no DINOv2."""

    name = "anylogo"
    decode = staticmethod(decoded)

    def __init__(
        self, frozen: Frozen, rank: int = 16, delivering: str = "decoder", keep: float = KEEP, through: bool = True
    ) -> None:
        if getattr(frozen.vision, "model_type", "") != "dinov2":
            raise ValueError("AnyLogo's tuning reads a DINOv2; give the file of one as the vision model.")
        self.frozen, self.keep = frozen, keep
        self.settings = {"rank": rank, "keep": keep, "detached": not through}
        every = frozen.family.sites(frozen.network)
        self.passes = Passes(frozen.network, every, select_sites(every, "self", delivering), through)
        features = frozen.vision.model.embed_dim
        self.modules = Tuning(frozen.network, rank, self.passes.groups.values(), features, frozen.context)
        self.modules.low_ranks.attach(frozen.network)
        self.form = MapsForm(frozen.context, features, self.modules.semantic.groups, KEPT)

    def groups_of_parameters(self, rate: float) -> list[dict[str, Any]]:
        """For an optimiser: the maps learn faster."""
        return [
            {"params": list(self.modules.low_ranks.parameters()), "lr": rate},
            {"params": list(self.modules.semantic.parameters()), "lr": MAPS_TIMES * rate},
        ]

    @torch.no_grad()
    def _seen(self, pictures: Tensor, masks: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        found, device = layers_seen(self.frozen.vision.model, self.frozen.pixels(pictures, masks)), self.frozen.device
        return tuple((patches.to(device), whole.to(device)) for patches, whole in found)

    def loss(self, samples: Sequence[Sample], generator: torch.Generator) -> Tensor:
        """Eq. 6 over some samples; all chance comes from the generator, on the CPU."""
        pictures, masks = (torch.stack([getattr(each, name) for each in samples]) for name in ("picture", "mask"))
        subjects = torch.stack([each.subject for each in samples])
        inside = torch.stack([each.subject_mask for each in samples])
        rows = {name: each.to(self.frozen.device) for name, each in drawn_rows(len(samples), generator).items()}
        context, pooled = self.frozen.prompts([each.caption for each in samples], rows["unconditional"])
        denoiser = self.frozen.denoiser
        clean, reference = self.frozen.latents(pictures), self.frozen.latents(subjects)
        sigmas = denoiser.levels(len(samples), generator)
        noisy = denoiser.noised(clean, sigmas, generator)
        noisy_reference = denoiser.noised(reference, sigmas, generator)
        cells = resize_mask(inside, tuple(reference.shape[-2:])).to(self.frozen.device)

        def extract(slots: Slots) -> None:
            denoiser.denoised(noisy_reference, sigmas, context, pooled, reference, **slots)

        behind = [whole for _, whole in self._seen(pictures, 1 - masks)]
        slots = self.passes.slots(
            self.modules.semantic, extract, self._seen(subjects, inside), behind, cells, rows, self.keep, generator
        )
        return denoiser.errors(denoiser.denoised(noisy, sigmas, context, pooled, **slots), clean, sigmas).mean()

    def write(self, modules: Tuning, folder: Path) -> tuple[Path, Path]:
        """Writes the maps, for Load Semantic Injection, and the LoRA, for the host's; gives their paths."""
        maps, lora = (folder / f"anylogo-{self.frozen.file}{end}.safetensors" for end in ("", "-lora"))
        by = "python tools/train_subjects.py --kind anylogo"
        save_whole(maps, tensors_of(modules.semantic.tensors()), metadata(self.form, self.frozen.family.name, by))
        save_whole(lora, modules.low_ranks.file(), {"trained_by": by})
        return maps, lora
