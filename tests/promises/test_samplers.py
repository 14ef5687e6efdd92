"""Promise 6: every sampler and scheduler of the host, over every mechanism."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import comfy.samplers
import comfy.supported_models
import pytest
import torch
from hosting.random_models import TINY, model_of
from subject_patches.patches.families import attention_sites, family_of
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import MECHANISMS, UNLIKE
from subject_patches.tests.shared.models import difference, sample
from subject_patches.tests.shared.samplers import sampler_for
from torch import Tensor
from torch.nn.functional import interpolate

# One of each kind: two calls a step, noise between steps, earlier steps remembered.
AGAIN = ("heun", "euler_ancestral", "dpmpp_sde", "dpmpp_2m", "uni_pc")


@pytest.fixture(scope="module")
def model() -> Any:
    return model_of(comfy.supported_models.SD15, TINY)


@pytest.fixture(scope="module")
def idle(model: Any) -> Any:
    """The model with every mechanism at strength 0, one upon the other."""
    return reduce(lambda below, mechanism: mechanism.off(below, "strength 0"), MECHANISMS, model)


def check(model: Any, idle: Any, again: bool, **run: Any) -> None:
    plain = sample(model, **run)
    assert torch.equal(sample(idle, **run), plain)
    for mechanism in UNLIKE:
        patched = mechanism.on(model)
        result = sample(patched, **run)
        assert result.isfinite().all(), mechanism.name
        assert difference(result, plain) > 0.003, mechanism.name
        # The second run has its features from the cache.
        assert not again or torch.equal(sample(patched, **run), result), mechanism.name


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_sampler(sampler: str, model: Any, idle: Any) -> None:
    check(model, idle, sampler in AGAIN, steps=3, **sampler_for(sampler, 0.2))


# Samplers of other packs that change the size of the latents


def growing(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, disable: Any) -> Tensor:
    """Euler's steps; between two of them the latents grow, and they end at the size they should have."""
    ends = tuple(x.shape[-2:])
    last = len(sigmas) - 2
    sizes = [ends if n in (0, last) else tuple(side + 2 * n for side in ends) for n in range(last + 1)]
    for number, (sigma, following) in enumerate(pairwise(sigmas)):
        x = interpolate(x, sizes[number], mode="bilinear")
        clean = model(x, sigma.expand(len(x)), **extra_args)
        callback({"i": number, "denoised": clean, "x": x, "sigma": sigma, "sigma_hat": sigma})
        x = x + (x - clean) / sigma * (following - sigma)
    return x


def twice(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, disable: Any) -> Tensor:
    """Euler's steps, each of them with a second look at every other pixel, at the same noise level."""
    for number, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = model(x, sigma.expand(len(x)), **extra_args)
        coarse = model(x[..., ::2, ::2].contiguous(), sigma.expand(len(x)), **extra_args)
        callback({"i": number, "denoised": clean, "x": x, "sigma": sigma, "sigma_hat": sigma})
        clean = torch.lerp(clean, interpolate(coarse, x.shape[-2:], mode="nearest"), 0.3)
        x = x + (x - clean) / sigma * (following - sigma)
    return x


@pytest.mark.parametrize("function", [growing, twice])
def test_a_sampler_that_changes_the_size(function: Any, model: Any, idle: Any) -> None:
    check(model, idle, True, steps=3, function=function)


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_scheduler(scheduler: str, model: Any, idle: Any) -> None:
    check(model, idle, True, steps=3, scheduler=scheduler)


# Transformers: one of each kind of opening, and several mechanisms at once. How an attention is known to be a layer's,
# and whether prompt and picture are attended to together (in a model that says where the picture begins, in one that
# does not) or apart.

OPENINGS = {
    "FLUX.1": ("index", {"joint"}),
    "Z-Image": ("index", {"joint"}),
    "Wan": ("index", {"self", "cross"}),
    "SD 3.5": ("replacement", {"joint", "self"}),
    "HiDream": ("order", {"joint"}),
}
TOGETHER = tuple(
    each for each in MECHANISMS if each.name in ("recycled self-attention", "soft layout bias", "dual branch")
)


@pytest.fixture(scope="module", params=OPENINGS)
def opened(request: Any) -> tuple[Any, Any]:
    """A model, and it with some mechanisms at work."""
    model = dit_model(request.param)
    told, kinds = OPENINGS[request.param]
    assert family_of(model).told == told
    assert {site.kind for site in attention_sites(model)} == kinds
    return model, reduce(lambda below, mechanism: mechanism.on(below), TOGETHER, model)


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_sampler_on_transformers(sampler: str, opened: tuple[Any, Any]) -> None:
    model, working = opened
    run = {"steps": 2, "size": (6, 4), **sampler_for(sampler, 0.4)}
    plain, patched = sample(model, **run), sample(working, **run)
    assert patched.isfinite().all()
    assert difference(patched, plain) > 0.003
    # What the run before left would be seen here.
    assert torch.equal(sample(model, **run), plain)
    if family_of(model).name == "FLUX.1":
        # A node at strength 0 never comes to the opening.
        idle = reduce(lambda below, mechanism: mechanism.off(below, "strength 0"), TOGETHER, model)
        assert torch.equal(sample(idle, **run), plain)
