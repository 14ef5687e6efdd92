"""Models of the host's own classes with random weights, and what else a sampling run takes, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from hosting.random_models import SMALL, SMALL_CONTEXT, generator, model_of
from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
from subject_patches.nodes.layout import LayoutBiasNode
from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
from subject_patches.nodes.retouch import MultiSourceSwapNode
from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
from subject_patches.nodes.router import RouteByAttentionNode, RouteByMasksNode
from subject_patches.patches.families import Transformer, family_of
from subject_patches.patches.mechanisms.dual_branch import BRANCH_KEY, BranchTokens
from subject_patches.patches.mechanisms.inversion import Inversion
from subject_patches.patches.mechanisms.layout_regions import Layout
from subject_patches.patches.mechanisms.subject import Reference, Share, Subject
from subject_patches.patches.parts.cache import MEGABYTE, FeatureCache
from subject_patches.patches.parts.prompt import SPANS_KEY
from torch import Tensor

from .dit_models import POOLED, second_context

CONTEXT = SMALL_CONTEXT
Conditioning = list[list[Any]]
CONCEPT = BranchTokens(((1, 6),), ((2, 4),))
AUXILIARY = BranchTokens(((1, 5),), ((2, 3),), auxiliary=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def small_model(seed: int = 0, in_channels: int = 4, **options: Any) -> Any:
    """The small SD 1.x MODEL; with 9 input channels an inpainting one."""
    return model_of(comfy.supported_models.SD15, {**SMALL, "in_channels": in_channels}, seed=seed, **options)


def prompt(seed: int, length: int = 7, width: int = CONTEXT, **values: Any) -> Conditioning:
    """An encoded prompt of random tokens with a pooled output, and further values in its dictionary."""
    source = generator(seed)
    tokens = torch.randn(1, length, width, generator=source)
    return [[tokens, {"pooled_output": torch.randn(1, POOLED, generator=source), **values}]]


def known_prompt(seed: int = 1, length: int = 7, width: int = CONTEXT, **values: Any) -> Conditioning:
    """An encoded prompt that knows where its phrases "subject" and "scene" are, as Encode Prompt with Subjects says,
    and that "subject" is its concept, as Dual-Branch Prompts does."""
    spans = {"subject": ((2, 4),), "scene": ((5, 6),)}
    return prompt(seed, length, width, **{SPANS_KEY: spans, BRANCH_KEY: CONCEPT, **values})


def reference(
    seed: int = 0,
    size: tuple[int, int] = (6, 8),
    channels: int = 4,
    masked: bool = True,
    frames: tuple[int, ...] = (),
) -> Reference:
    """A picture of a subject as Subject Reference makes it: random latents, the left two thirds its own."""
    source = generator(1000 + seed)
    mask = torch.zeros(1, *size)
    mask[:, :, : -(-2 * size[1] // 3)] = 1
    image = torch.rand(1, 8 * size[0], 8 * size[1], 3, generator=source)
    return Reference(image, torch.randn(1, channels, *frames, *size, generator=source), mask if masked else None)


def subject(
    *references: Reference, megabytes: float = 64, seed: int = 0, phrase: str = "subject", **share: Any
) -> Subject:
    """One subject; without references given, it has one."""
    cache = FeatureCache(int(megabytes * MEGABYTE))
    return Subject(references or (reference(seed),), phrase, cache, Share(**share))


def subject_for(model: Any, seed: int = 0, **values: Any) -> Subject:
    """One subject with one reference, of a MODEL's kind of latents."""
    channels = model.model.latent_format.latent_channels
    return subject(reference(seed, channels=channels, frames=frames_of(model)), seed=seed, **values)


def latent_noise(
    batch: int, size: tuple[int, int], seed: int, channels: int = 4, frames: tuple[int, ...] = ()
) -> Tensor:
    """Row r's noise depends on the seed plus r only, so that rows can be sampled alone. `frames` is (1,) for one frame
    of a video model."""
    shape = (1, channels, *frames, *size)
    return torch.cat([torch.randn(shape, generator=generator(seed + row)) for row in range(batch)])


def frames_of(model: Any) -> tuple[int, ...]:
    """What lies between channels and height in the shape of a MODEL's latents for one picture: (1,) or ()."""
    return (1,) * (model.model.latent_format.latent_dimensions - 2)


def counted(model: Any, calls: list[int]) -> Any:
    """A clone that writes down the rows of every call of the model, companions' included: as a patch of a layer that
    treats each row by itself, since what wraps a call sees the picture's only."""

    def count(embedding: Tensor, *_: Any) -> Tensor:
        calls.append(len(embedding))
        return embedding

    clone = model.clone()
    clone.set_model_emb_patch(count)
    return clone


def through(model: Any, call: Callable[..., Tensor]) -> Any:
    """A clone whose every call, companions' included, is `call(the own, x, sigma, **the rest)`: as an object of the
    model's, since what wraps a call sees the picture's only."""
    clone = model.clone()
    clone.add_object_patch("apply_model", partial(call, model.model.apply_model))
    return clone


@contextmanager
def inputs_of(model: Any) -> Iterator[list[dict[str, Any]]]:
    """What a model's network is called with meanwhile, whoever calls it: its latents "x", "timesteps" and the rest."""
    seen: list[dict[str, Any]] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({**kwargs, "x": args[0].clone(), "timesteps": args[1]})

    hook = model.model.diffusion_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def levels(model: Any, steps: int, scheduler: str = "normal") -> Tensor:
    """The noise levels of a schedule of the host's."""
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def sample(
    model: Any,
    *,
    batch: int = 1,
    size: tuple[int, int] = (8, 8),
    steps: int = 2,
    sampler: str = "euler",
    scheduler: str = "normal",
    cfg: float = 3.0,
    positive: Conditioning | None = None,
    negative: Conditioning | None = None,
    seed: int = 5,
    latent: Tensor | None = None,
    mask: Tensor | None = None,
    denoise: float = 1.0,
    callback: Callable[..., None] | None = None,
    function: Callable[..., Tensor] | None = None,
) -> Tensor:
    """What the host's KSampler node does, with noise of ours; with a sampler `function`, what SamplerCustom does."""
    noise = latent_noise(batch, size, seed, model.model.latent_format.latent_channels, frames_of(model))
    # The host draws its noise from the global generator, so each run of a workflow begins with it seeded.
    torch.manual_seed(seed)
    positive = known_prompt(**second_context(model, 1)) if positive is None else positive
    negative = prompt(2, **second_context(model, 2)) if negative is None else negative
    latent = torch.zeros_like(noise) if latent is None else latent
    given = {"noise_mask": mask, "callback": callback, "disable_pbar": True, "seed": seed}
    with torch.inference_mode():
        if function is not None:
            return comfy.sample.sample_custom(
                model, noise, cfg, comfy.samplers.KSAMPLER(function), levels(model, steps), positive, negative, latent,
                **given,
            )  # fmt: skip
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise, **given
        )


def level_of(model: Any) -> str:
    """At which noise level tests look at references: on SD 1.x and 2.x at the picture's own, which takes a pass a step
    and a place in the cache for each, so that more can go wrong; elsewhere as the nodes do by default."""
    early = (comfy.supported_models.SD15, comfy.supported_models.SD20)
    return "current" if isinstance(model.model.model_config, early) else "usual"


def recycled(model: Any, subjects: tuple[Subject, ...] | None = None, **values: Any) -> Any:
    """The Recycled Self-Attention node with its defaults, but for the level at which references are looked at, see
    `level_of`; `values` are its inputs."""
    values = {"noise_level": level_of(model), **values}
    given = {"strength": 1.0, "keep_probability": 1.0, "sites": "usual", "start_percent": 0.0, "end_percent": 1.0}
    chosen = (subject(),) if subjects is None else subjects
    return RecycledSelfAttentionNode.execute(model, chosen, **{**given, "seed": 0, **values}).args[0]


def laid_out(model: Any, layout: Layout, **values: Any) -> Any:
    """The Layout Bias node with its defaults; `values` are its inputs. A negative weight is no hard mask."""
    given = {"guidance_weight": 0.08, "positive_weight": 2.5, "hard_mask": "negative_weight" not in values}
    rest = {"weaken": "everywhere outside", "start_percent": 0.0, "end_percent": 1.0}
    return LayoutBiasNode.execute(model, layout, **{**given, **rest, **values}).args[0]


def masks(count: int, size: tuple[int, int] = (20, 30)) -> Tensor:
    """Masks of `count` subjects at no model's size: stripes side by side, the lower quarter left to the background."""
    height, width = size
    painted = torch.zeros(count, height, width)
    for number in range(count):
        painted[number, : height * 3 // 4, number * width // count : (number + 1) * width // count] = 1
    return painted


def mask_router(count: int) -> Any:
    """Route Subjects by Masks, of `masks`."""
    return RouteByMasksNode.execute(masks=masks(count)).args[0]


def map_router(**values: Any) -> Any:
    """Route Subjects by Attention with its defaults; `values` are its inputs."""
    return RouteByAttentionNode.execute(**values).args[0]


def routed(model: Any, subjects: tuple[Subject, ...], router: Any = None, **values: Any) -> Any:
    """The Routed Reference Attention node with its defaults, by `masks`, but for the level at which references are
    looked at, see `level_of`; `values` are its inputs."""
    values = {"noise_level": level_of(model), **values}
    router = mask_router(len(subjects)) if router is None else router
    return RoutedReferenceAttentionNode.execute(model, subjects, router, **values).args[0]


def trajectory(latents: Tensor, cache: FeatureCache | None = None, seed: int = 40, family: str = "SD 1.x") -> Inversion:
    """A path as Invert to Trajectory makes it for the small model: one fixed noise over the latents (rows, 4, h, w)."""
    sigmas = torch.tensor([20.0, 5.0, 1.0, 0.3, 0.0])
    noise = torch.randn(latents.shape, generator=generator(seed))
    states = latents + sigmas.view(-1, 1, 1, 1, 1) * noise
    return Inversion(sigmas, states, family, FeatureCache(64 * MEGABYTE) if cache is None else cache)


def trajectory_for(model: Any, latents: Tensor, cache: FeatureCache | None = None, seed: int = 40) -> Inversion:
    """As `trajectory`, for a MODEL of any family that the pack knows; of any other, as for the small model."""
    try:
        family = family_of(model)
    except ValueError:
        return trajectory(latents, cache, seed)
    if not isinstance(family, Transformer):
        return trajectory(latents, cache, seed, family.name)
    sigmas = torch.tensor([1.0, 0.7, 0.4, 0.1, 0.0])
    noise = torch.randn(latents.shape, generator=generator(seed))
    states = torch.stack([torch.lerp(latents, noise, float(sigma)) for sigma in sigmas])
    return Inversion(sigmas, states, family.name, FeatureCache(64 * MEGABYTE) if cache is None else cache)


def swapped(model: Any, layout: Inversion | None = None, reference: Inversion | None = None, **values: Any) -> Any:
    """The Multi-Source Attention Swap node with its defaults; `values` are its inputs."""
    return MultiSourceSwapNode.execute(model, layout, reference, **values).args[0]


def auxiliary_prompt(seed: int = 9, length: int = 7, **values: Any) -> Conditioning:
    """An auxiliary prompt, as Dual-Branch Prompts makes it."""
    return prompt(seed, length, **{BRANCH_KEY: AUXILIARY, **values})


def integrated(model: Any, **values: Any) -> Any:
    """The Dual-Branch Integration node with its defaults, over the whole schedule; `values` are its inputs."""
    more = second_context(model, 1)
    given = {
        "concept": known_prompt(**more),
        "auxiliary": auxiliary_prompt(**more),
        "injection_strength": 1.0,
        "strength": 1.0,
    }
    return DualBranchIntegrationNode.execute(model, **{**given, "end_percent": 1.0, **values}).args[0]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value of `other`."""
    return float((one - other).abs().max() / other.abs().max())
