"""Algorithm 1 of Layout-and-Retouch step by step, against plain hooks on the attention layers of the toy's U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.streams import Trajectory
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.retouch import MultiSourceSwap, path_of
from subject_patches.patches.parts.sites import select_sites
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.models import difference, randn
from subject_patches.toy.sampling import Toy
from torch import Tensor

TOLERANCE = 2e-5


@dataclass
class Hooked:
    """The U-Net's attention layers with hooks: what goes into each, and comes out before its projection, is kept; what
    is in `lent` takes its place. Names are (self or cross, block, number, part)."""

    unet: Any
    kept: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    lent: dict[tuple[Any, ...], Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[tuple[str, str, int], Any]]:
        blocks = [("middle", 0, self.unet.middle_block)]
        blocks += [("input", number, block) for number, block in enumerate(self.unet.input_blocks)]
        blocks += [("output", number, block) for number, block in enumerate(self.unet.output_blocks)]
        for name, number, block in blocks:
            for transformer in (layer for layer in block if isinstance(layer, SpatialTransformer)):
                (inner,) = transformer.transformer_blocks
                yield ("self", name, number), inner.attn1
                yield ("cross", name, number), inner.attn2

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for name, layer in self.layers():
            for part, module in (("query", layer.to_q), ("key", layer.to_k), ("value", layer.to_v)):
                handles.append(module.register_forward_hook(lambda _m, _i, out, at=(*name, part): self.at(at, out)))
            into = layer.to_out.register_forward_pre_hook(
                lambda _m, args, at=(*name, "output"): (self.at(at, args[0]),)
            )
            handles.append(into)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def at(self, name: tuple[Any, ...], tensor: Tensor) -> Tensor:
        given = self.lent[name](tensor) if name in self.lent else tensor
        self.kept[name] = given
        return given

    def run(self, model: Any, x: Tensor, sigma: Tensor, tokens: Tensor, lent: dict[Any, Any]) -> tuple[Tensor, dict]:
        self.kept, self.lent = {}, lent
        with self.hooks():
            clean = model.apply_model(x, sigma.expand(len(x)), c_crossattn=tokens.expand(len(x), -1, -1))
        return clean, self.kept


@dataclass(frozen=True)
class Retouching:
    """A case of Algorithm 1: the first `early` steps and those from `blending` on, counted from 0."""

    layout: Trajectory
    reference: Trajectory
    sigmas: Tensor
    prompts: dict[str, Tensor]
    mask: Tensor | None
    early: int
    blending: int
    both: bool
    cfg: float = 3.0


def constant(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: tensor


def blend_with(layout: Tensor, mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda own: mask * own + (1 - mask) * layout


def plain_steps(toy: Toy, case: Retouching) -> list[Tensor]:
    """The target's latents before every step and after the last."""
    model = toy.model.model
    hooked = Hooked(model.diffusion_model)
    x = case.layout.states[0]
    states = [x]
    for step, (sigma, following) in enumerate(zip(case.sigmas[:-1], case.sigmas[1:], strict=True)):
        clean = []
        for target, source in (("reference", "layout"), ("negative", "negative")):
            lent: dict[Any, Any] = {}
            if target == "reference" or case.both:
                other = "reference" if target == "reference" else "negative"
                _, layout = hooked.run(model, case.layout.states[step], sigma, case.prompts[source], {})
                _, reference = hooked.run(model, case.reference.states[step], sigma, case.prompts[other], {})
                lent = lends(case, step, layout, reference)
            clean.append(hooked.run(model, x, sigma, case.prompts[target], lent)[0])
        conditioned, unconditioned = clean
        denoised = unconditioned + case.cfg * (conditioned - unconditioned)
        x = x + (x - denoised) / sigma * (following - sigma)
        states.append(x)
    return states


def lends(case: Retouching, step: int, layout: dict[Any, Tensor], reference: dict[Any, Tensor]) -> dict[Any, Any]:
    """Lines 9 to 13, in the decoder and the middle."""
    lent: dict[Any, Any] = {}
    for kind, block, number, part in layout:
        name = (kind, block, number, part)
        if block == "input":
            continue
        if step < case.early:
            if part != "output":
                lent[name] = constant(layout[name])
        elif kind == "self" and part in ("key", "value"):
            lent[name] = constant(reference[name])
        elif kind == "self" and part == "output" and step >= case.blending and case.mask is not None:
            places = layout[name].shape[1]
            side = {256: 16, 64: 8, 16: 4}[places]
            mask = torch.nn.functional.avg_pool2d(case.mask[None], case.mask.shape[-1] // side).flatten()[:, None]
            lent[name] = blend_with(layout[name], mask)
    return lent


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy.load()


def trajectory(sigmas: Tensor, seed: int, rows: int = 1) -> Trajectory:
    """A path of random latents with random noise."""
    clean, noise = randn(rows, 8, 16, 16, seed=seed), randn(rows, 8, 16, 16, seed=seed + 1)
    return Trajectory(sigmas, clean + sigmas.view(-1, 1, 1, 1, 1) * noise)


@pytest.mark.parametrize(
    ("early", "blending", "both", "masked"),
    [(2, 3, True, True), (1, 2, False, True), (2, 3, True, False), (0, 5, True, False)],
    ids=["both chunks", "cond only", "no mask", "the reference alone"],
)
def test_algorithm_1_step_by_step(early: int, blending: int, both: bool, masked: bool, toy: Toy) -> None:
    model = toy.model
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 5)
    captions = {"layout": "a red star on grass", "reference": "an emblem", "negative": ""}
    with torch.inference_mode():
        prompts = {name: toy.encode([caption])[0][0] for name, caption in captions.items()}
    mask = torch.zeros(1, 16, 16)
    mask[:, 3:11, 4:13] = 1
    mask[:, 5:8, 4:9] = 0.5
    case = Retouching(
        trajectory(sigmas, 10), trajectory(sigmas, 20), sigmas, prompts, mask if masked else None, early, blending, both
    )
    # The schedule's shares of these five steps are 0, 1/4, 1/2, 3/4 and 1.
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    sites = attention_sites(model)
    edit = MultiSourceSwap(
        select_sites(sites, "self", "decoder"),
        Window(),
        path_of(case.layout, [[prompts["layout"], {}]], both) if early or masked else None,
        path_of(case.reference, None, both),
        switch=shares[early] - 0.1 if early else 0.0,
        blend_from=min(shares[min(blending, 4)], 1.0) - 0.1,
        mask=case.mask,
        crossing=select_sites(sites, "cross", "decoder"),
    )
    seen: list[Tensor] = []
    with torch.inference_mode():
        right = plain_steps(toy, case)
        sampled = comfy.sample.sample_custom(
            add_edit(model, edit), torch.zeros_like(right[0]), case.cfg, comfy.samplers.sampler_object("euler"), sigmas,
            [[prompts["reference"], {}]], [[prompts["negative"], {}]], case.layout.states[0],
            callback=lambda step, x0, x, total: seen.append(x.clone()), disable_pbar=True, seed=0,
        )  # fmt: skip
        without = comfy.sample.sample_custom(
            model, torch.zeros_like(right[0]), case.cfg, comfy.samplers.sampler_object("euler"), sigmas,
            [[prompts["reference"], {}]], [[prompts["negative"], {}]], case.layout.states[0], disable_pbar=True, seed=0,
        )  # fmt: skip
    for step, (ours, plain) in enumerate(zip([*seen, sampled], right, strict=True)):
        assert difference(ours, plain) < TOLERANCE, f"step {step}"
    assert difference(without, right[-1]) > 0.05
