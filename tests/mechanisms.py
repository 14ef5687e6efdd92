"""The mechanisms that every promise is tested over. A new one joins with one line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from subject_patches.patches.layout_regions import Layout, Region
from subject_patches.patches.subject import Share, Subject
from torch import Tensor

from .models import (
    CONTEXT,
    generator,
    laid_out,
    map_router,
    mask_router,
    recycled,
    routed,
    sample,
    small_model,
    subject,
)

Window = tuple[float, float]


@dataclass(frozen=True)
class Mechanism:
    """`patch` is (model, subjects, strength, window) -> patched model."""

    name: str
    patch: Callable[[Any, tuple[Subject, ...], float, Window], Any]

    def on(self, model: Any, subjects: tuple[Subject, ...] | None = None, strength: float = 1.0) -> Any:
        """The model with the mechanism at work."""
        return self.patch(model, (subject(),) if subjects is None else subjects, strength, (0.0, 1.0))

    def off(self, model: Any, how: str) -> Any:
        """The model with a node that has nothing to do, for the reason `how`, one of `IDLE`."""
        return self.patch(
            model,
            () if how == "no subject" else (subject(),),
            0.0 if how == "strength 0" else 1.0,
            (0.4, 0.4) if how == "empty window" else (0.0, 1.0),
        )


IDLE = ("strength 0", "empty window", "no subject")


def left_half() -> Tensor:
    """A region mask at no model's size."""
    mask = torch.zeros(1, 20, 30)
    mask[:, :, :15] = 1
    return mask


def _recycled(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window, **values: Any) -> Any:
    start, end = window
    return recycled(model, subjects, strength=strength, start_percent=start, end_percent=end, **values)


def _laid_out(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window, **values: Any) -> Any:
    half = torch.zeros(20, 30, dtype=torch.bool)
    half[:, :15] = True
    regions = (Region("subject", half), Region("scene", ~half)) if subjects else ()
    weight = 0.08 * strength
    start, end = window
    layout = Layout(30, 20, regions)
    return laid_out(model, layout, guidance_weight=weight, start_percent=start, end_percent=end, **values)


def _routed(
    model: Any, subjects: tuple[Subject, ...], strength: float, window: Window, *, count: int = 1, **values: Any
) -> Any:
    # Further subjects differ with the first, whose window and phrase differ from theirs.
    if subjects:
        phrases = ("scene", *(f"subject {number}" for number in range(2, 9)))
        others = (subject(seed=100 + number, phrase=phrases[number]) for number in range(count - 1))
        subjects = (*subjects[:1], *others)
    start, end = window
    router = values.pop("router", None) or mask_router(count)
    return routed(model, subjects, router, strength=strength, start_percent=start, end_percent=end, **values)


def _prompted(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window) -> Any:
    tokens = torch.randn(1, 3, CONTEXT, generator=generator(60))
    given = tuple(replace(each, share=Share(0.0, tokens=tokens)) for each in subjects)
    start, end = window
    return routed(model, given, mask_router(1), eta=strength, start_percent=start, end_percent=end)


MECHANISMS = (
    Mechanism("recycled self-attention", _recycled),
    Mechanism("recycled self-attention in a region", partial(_recycled, region_mask=left_half())),
    Mechanism("sparsely recycled self-attention", partial(_recycled, keep_probability=0.5, seed=3)),
    Mechanism("layout bias", _laid_out),
    Mechanism("soft layout bias", partial(_laid_out, negative_weight=-5.0, weaken="other regions", eta="constant")),
    Mechanism("a routed reference", _routed),
    Mechanism(
        "two routed references", partial(_routed, count=2, noise_level="nearly clean", cross_attention="skipped")
    ),
    Mechanism("eight routed references", partial(_routed, count=8, sites="encoder and decoder")),
    Mechanism("two references routed by maps", partial(_routed, count=2, router=map_router())),
    Mechanism("a reference routed by the layer before", partial(_routed, router=map_router(maps="preceding layer"))),
    Mechanism("a routed image prompt", _prompted),
)


def fingerprint(mechanism: Mechanism) -> str:
    """A digest of what a mechanism's patched model samples."""
    result = sample(mechanism.on(small_model()), batch=2)
    return hashlib.sha256(result.numpy().tobytes()).hexdigest()
