"""The mechanisms that every promise is tested over. A new one joins with one line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from subject_patches.nodes.image_prompt import layer_channels
from subject_patches.patches.mechanisms.blend_mask import AdaptiveMask
from subject_patches.patches.mechanisms.image_prompt import AdaptedPrompt, KeysAndValues, TokenPrompt, in_file_order
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.mechanisms.subject import Share, Subject
from torch import Tensor

from .anystory_models import anystory
from .dit_models import dit_model
from .models import (
    CONTEXT,
    auxiliary_prompt,
    generator,
    integrated,
    laid_out,
    map_router,
    mask_router,
    recycled,
    reference,
    routed,
    sample,
    second_context,
    small_model,
    subject,
    subject_for,
    swapped,
    trajectory_for,
)
from .semantics import told as told_meaning
from .subject_encoders import encoded_subject, learned_router

Window = tuple[float, float]


@dataclass(frozen=True)
class Mechanism:
    """`patch` is (model, subjects, strength, window) -> patched model; of a `sized` one it also takes the `size` of the
    latents that will be sampled. One that `lends` shows the latents of its subjects; one that does not `begin` has a
    window that starts with the schedule."""

    name: str
    patch: Callable[..., Any]
    sized: bool = False
    lends: bool = True
    begins: bool = True

    def on(
        self,
        model: Any,
        subjects: tuple[Subject, ...] | None = None,
        strength: float = 1.0,
        size: tuple[int, int] = (8, 8),
    ) -> Any:
        """The model with the mechanism at work, for latents of `size`."""
        values = {"size": size} if self.sized else {}
        return self.patch(
            model, (subject_for(model),) if subjects is None else subjects, strength, (0.0, 1.0), **values
        )

    def off(self, model: Any, how: str) -> Any:
        """The model with a node that has nothing to do, for the reason `how`, one of `IDLE`."""
        return self.patch(
            model,
            () if how == "no subject" else (subject_for(model),),
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
        others = (subject_for(model, 100 + number, phrase=phrases[number]) for number in range(count - 1))
        subjects = (*subjects[:1], *others)
    start, end = window
    router = values.pop("router", None) or mask_router(count)
    return routed(model, subjects, router, strength=strength, start_percent=start, end_percent=end, **values)


def _prompted(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window) -> Any:
    tokens = torch.randn(1, 3, CONTEXT, generator=generator(60))
    given = tuple(replace(each, share=Share(0.0, prompt=TokenPrompt(tokens))) for each in subjects)
    start, end = window
    return routed(model, given, mask_router(1), eta=strength, start_percent=start, end_percent=end)


def _adapted(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window) -> Any:
    channels, source = layer_channels(model, "cross"), generator(61)

    def pairs() -> tuple[KeysAndValues, ...]:
        shapes = [(1, 3, channels[site]) for site in in_file_order(channels)]
        return tuple((torch.randn(shape, generator=source), torch.randn(shape, generator=source)) for shape in shapes)

    own, empty = pairs(), pairs()
    prompt = AdaptedPrompt("adapter", CONTEXT, own, empty)
    given = tuple(replace(each, share=Share(0.0, prompt=prompt)) for each in subjects)
    start, end = window
    return routed(model, given, mask_router(1), eta=strength, start_percent=start, end_percent=end)


def _told_meaning(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window, **values: Any) -> Any:
    start, end = window
    return told_meaning(model, subjects, strength=strength, start_percent=start, end_percent=end, **values)


def _encoded(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window) -> Any:
    return _recycled(model, tuple(encoded_subject(model, each) for each in subjects), strength, window)


def _encoded_in_places(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window) -> Any:
    # References and tokens have a weight each.
    return _routed(model, tuple(encoded_subject(model, each) for each in subjects), strength, window, eta=strength)


def _encoded_and_routed(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window) -> Any:
    two = tuple(encoded_subject(model, each, number) for number, each in enumerate(_with_another(model, subjects)))
    start, end = window
    router = learned_router(model)
    return routed(model, two, router, strength=strength, eta=strength, start_percent=start, end_percent=end)


def _with_another(model: Any, subjects: tuple[Subject, ...]) -> tuple[Subject, ...]:
    return (*subjects[:1], subject_for(model, 101, phrase="scene")) if subjects else ()


def _retouched(
    model: Any,
    subjects: tuple[Subject, ...],
    strength: float,
    window: Window,
    size: tuple[int, int] = (8, 8),
    *,
    lambda2: float = 0.0,
    **values: Any,
) -> Any:
    # The mask blends from the first step on, or for no part of the schedule.
    start, end = window
    shares = {"lambda2": lambda2 * strength, "mask_blend_start": 1.0 - strength}
    given = {**shares, "start_percent": start, "end_percent": end, **values}
    if not subjects:
        return swapped(model, **{**given, "blend_mask": None})
    latents, cache = subjects[0].references[0].latents, subjects[0].cache
    reference = trajectory_for(model, latents, cache) if strength else None
    # Of latents with frames, a picture is one.
    frames = latents.shape[2:-2]
    turned = torch.nn.functional.interpolate(latents.flip(-1), (*frames, *size))
    layout = trajectory_for(model, turned) if values or not strength else None
    return swapped(model, layout, reference, **given)


def _integrated(model: Any, subjects: tuple[Subject, ...], strength: float, window: Window, **values: Any) -> Any:
    # Another auxiliary prompt for each subject; one at least has to be.
    seed = round(1000 * float(subjects[0].references[0].latents.mean())) + 10**6 if subjects else 0
    auxiliary = auxiliary_prompt(seed, **second_context(model, seed)) if subjects else []
    start, end = window
    end = 0.0 if start == end else end
    return integrated(model, auxiliary=auxiliary, strength=strength, end_percent=end, **values)


MECHANISMS = (
    Mechanism("recycled self-attention", _recycled),
    Mechanism("recycled self-attention in a region", partial(_recycled, region_mask=left_half())),
    Mechanism("sparsely recycled self-attention", partial(_recycled, keep_probability=0.5, seed=3)),
    Mechanism("layout bias", _laid_out, lends=False),
    Mechanism(
        "soft layout bias",
        partial(_laid_out, negative_weight=-5.0, weaken="other regions", eta="constant"),
        lends=False,
    ),
    Mechanism("a routed reference", _routed),
    Mechanism(
        "two routed references", partial(_routed, count=2, noise_level="nearly clean", cross_attention="skipped")
    ),
    Mechanism("eight routed references", partial(_routed, count=8, sites="encoder and decoder")),
    Mechanism("two references routed by maps", partial(_routed, count=2, router=map_router())),
    Mechanism("a reference routed by the layer before", partial(_routed, router=map_router(maps="preceding layer"))),
    Mechanism("a routed image prompt", _prompted),
    Mechanism("an adapter's image prompt", _adapted),
    Mechanism(
        "semantic injection",
        partial(_told_meaning, background=torch.rand(1, 40, 24, 3, generator=generator(62))),
        lends=False,
    ),
    Mechanism("an encoded subject", _encoded, lends=False),
    Mechanism("an encoded subject in its places", _encoded_in_places, lends=False),
    Mechanism("encoded subjects by a learned router", _encoded_and_routed, lends=False),
    Mechanism("a swapped reference", _retouched),
    # Of two steps the layout lends the first, and the reference the second.
    Mechanism(
        "multi-source swap",
        partial(_retouched, lambda2=0.3, blend_mask=AdaptiveMask(left_half(), "subject")),
        sized=True,
    ),
    Mechanism("dual branch", _integrated, lends=False, begins=False),
    Mechanism(
        "dual branch with guidance of its own",
        partial(_integrated, guidance="own", gain_mode="by resolution"),
        lends=False,
        begins=False,
    ),
)


@cache
def _further_subject(channels: int, seed: int) -> Subject:
    return subject(reference(seed, channels=channels), seed=seed)


def _told(
    model: Any, subjects: tuple[Subject, ...], strength: float, window: Window, *, count: int = 1, **values: Any
) -> Any:
    # The same ones each time, so that only the first run looks at them: together with others, or alone, they differ by
    # rounding.
    channels = model.model.latent_format.latent_channels
    others = tuple(_further_subject(channels, 200 + number) for number in range(count - 1)) if subjects else ()
    start, end = window if strength else (0.0, 0.0)
    given = {"reference_start": start, "reference_end": end, "token_start": start, "token_end": end}
    return anystory(model, (*subjects[:1], *others), token_scale=strength, **given, **values)


# What works on FLUX.1 alone.
FLUX_MECHANISMS = (
    Mechanism("AnyStory", _told),
    Mechanism("AnyStory with three subjects", partial(_told, count=3)),
)
# These differ from others of the table in how many references or regions there are: what is tried with every sampler,
# and with every node of the host, is tried with those.
ALIKE = ("recycled self-attention in a region", "soft layout bias", "eight routed references", "an encoded subject")
UNLIKE = tuple(each for each in MECHANISMS if each.name not in ALIKE)
# One of each kind that works on every family.
OF_EACH_KIND = tuple(
    each
    for each in MECHANISMS
    if each.name
    in (
        "recycled self-attention in a region",
        "soft layout bias",
        "two references routed by maps",
        "dual branch",
    )
)
over_mechanisms = pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
over_unlike = pytest.mark.parametrize("mechanism", UNLIKE, ids=lambda m: m.name)


def fingerprints() -> list[str]:
    """A digest of what each mechanism's patched model samples."""
    pairs = [(small_model, each) for each in MECHANISMS]
    pairs += [(partial(dit_model, "FLUX.1"), each) for each in (*FLUX_MECHANISMS, *OF_EACH_KIND)]
    results = (sample(mechanism.on(made()), batch=2) for made, mechanism in pairs)
    return [hashlib.sha256(result.numpy().tobytes()).hexdigest() for result in results]
