"""What a reference lends to the generation, computed without the pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.subject import Subject
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.models import generator, prompt
from torch import Tensor


def keys_and_values(
    model: Any, who: Subject, number: int, sigma: float, seed: int, prompted: bool = True
) -> dict[Site, tuple[Tensor, Tensor]]:
    """The reference's keys and values by a forward of the bare model, straight from the equations: the latents with
    sigma times one fixed noise, every place of the mask that is at least half the subject's. Without `prompted` the
    layers add nothing of the prompt to what they get."""
    ours = who.references[number]
    clean = ours.latents * model.model.latent_format.scale_factor
    noisy = clean + sigma * torch.randn(clean.shape, generator=generator(seed))
    kept: dict[Site, tuple[Tensor, Tensor]] = {}

    def keeper(site: Site) -> Callable[..., Tensor]:
        def keep(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
            height, width = extra["activations_shape"][-2:]
            inside = torch.ones(height * width, dtype=torch.bool)
            if ours.mask is not None:
                inside = torch.nn.functional.adaptive_avg_pool2d(ours.mask, (height, width)).flatten() >= 0.5
            kept[site] = (key[:, inside], value[:, inside])
            return dense.attention(query, key, value, extra["n_heads"]).float()

        return keep

    sites = [site for site in attention_sites(model) if site.kind == "self"]
    options: dict[str, Any] = {"patches_replace": {"attn1": {site.key: keeper(site) for site in sites}}}
    if not prompted:
        options["patches"] = {"attn2_output_patch": [lambda output, _: 0 * output]}
    (tokens, _), *_ = prompt(1)
    with torch.inference_mode():
        model.model.apply_model(noisy, torch.tensor([sigma]), c_crossattn=tokens, transformer_options=options)
    return kept
