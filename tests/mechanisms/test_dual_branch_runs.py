"""Dual-branch integration in sampling runs of the host: what runs when, and which prompts are mixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from comfy_extras.nodes_perpneg import Guider_PerpNeg
from subject_patches.nodes.step_blended_guider import StepBlendedGuiderNode
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.edit import Edit
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.streams import Features, Stream
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.dual_branch import BRANCH_KEY, BranchWindow, crop
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.prompt import SPANS_KEY
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.models import (
    auxiliary_prompt,
    difference,
    integrated,
    known_prompt,
    laid_out,
    latent_noise,
    levels,
    prompt,
    sample,
    through,
)
from subject_patches.tests.shared.samplers import sampler_for
from torch import Tensor

SIZE = (7, 10)
SHARE = 0.5


def passes(model: Any, **run: Any) -> list[tuple[float, int]]:
    """The noise level and the rows of each call of the model."""
    calls: list[tuple[float, int]] = []

    def count(apply: Callable[..., Tensor], x: Tensor, sigma: Tensor, **values: Any) -> Tensor:
        calls.append((float(sigma[0]), len(x)))
        return apply(x, sigma, **values)

    sample(through(model, count), **{"size": SIZE, **run})
    return calls


@pytest.mark.parametrize(("guidance", "more"), [("shared", 1), ("own", 2)])
def test_nothing_of_the_branch_runs_outside_its_window(guidance: str, more: int, model: Any) -> None:
    calls = passes(integrated(model, end_percent=0.15, guidance=guidance), steps=20)
    rows = [sum(n for s, n in calls if s == float(sigma)) for sigma in levels(model, 20)[:-1]]
    assert rows == [2 + more] * 3 + [2] * 17
    # One pass more without guidance, which is the branch's own.
    assert sum(n for _, n in passes(integrated(model, end_percent=0.15, guidance=guidance), steps=20, cfg=1.0)) == 23


def watched(model: Any, calls: list[tuple[float, Tensor, Tensor | None]]) -> Any:
    """The model, telling of each pass in `calls`: its noise level, its latents and, of the auxiliary prompt's, what it
    predicts."""
    ((other, _),) = auxiliary_prompt()

    def watch(apply: Callable[..., Tensor], x: Tensor, sigma: Tensor, **values: Any) -> Tensor:
        predicted = apply(x, sigma, **values)
        own = torch.equal(values["c_crossattn"], other)
        calls.append((float(sigma[0]), x.clone(), predicted if own else None))
        return predicted

    return through(model, watch)


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_the_branchs_own_steps_under_every_sampler(sampler: str, model: Any) -> None:
    """Euler's, between the levels at which the sampler calls the model; without guidance, to see them bare. Those of
    CFG++ are in test_branch_regimes.py."""
    patched = integrated(model, end_percent=SHARE)
    run = {"steps": 5, "size": SIZE, "cfg": 1.0, **sampler_for(sampler, 0.05)}
    calls: list[tuple[float, Tensor, Tensor | None]] = []
    result = sample(watched(patched, calls), **run)
    assert result.isfinite().all()
    assert difference(result, sample(model, **run)) > 0.001
    assert torch.equal(sample(patched, **run), result)
    window, sampling = BranchWindow(0.0, SHARE), model.get_model_object("model_sampling")
    asked = [sigma for sigma, _, predicted in calls if predicted is None]
    visited = [sigma for sigma, _ in itertools.groupby(asked) if window.contains(sigma, sampling.percent_to_sigma)]
    mine = [(sigma, x, predicted) for sigma, x, predicted in calls if predicted is not None]
    # Once at each level, however often the sampler asks there.
    assert [sigma for sigma, *_ in mine] == visited
    path: list[tuple[float, Tensor, Tensor]] = []
    for sigma, state, predicted in mine:
        while path and path[-1][0] < sigma:
            path.pop()
        if path and path[-1][0] > sigma:
            last, before, clean = path[-1]
            right = before + (before - clean) / last * (sigma - last)
            if "cfg_pp" not in sampler:
                torch.testing.assert_close(state, right, rtol=1e-4, atol=1e-4)
        elif path:
            assert torch.equal(state, path[-1][1])
        if not path or path[-1][0] != sigma:
            path.append((sigma, state, predicted))
    assert len(path) > 1


@pytest.mark.parametrize("guidance", ["none", "own"])
@pytest.mark.parametrize("layout_last", [False, True])
def test_a_layout_holds_in_the_branch(guidance: str, layout_last: bool, model: Any) -> None:
    """The branch goes the way of a generation of its own prompt with that layout and its own guidance, step by step."""
    height, width = SIZE
    sides = box(width, height, 0, 0, width // 2, height), box(width, height, width // 2, 0, width, height)
    layout = Layout(width, height, (Region("subject", sides[0]), Region("scene", sides[1])))
    spans = {"subject": ((2, 3),), "scene": ((4, 5),)}
    auxiliary = prompt(9, 7, **{BRANCH_KEY: auxiliary_prompt()[0][1][BRANCH_KEY], SPANS_KEY: spans})
    values = {"auxiliary": auxiliary, "noise": "the concept's"}
    run: dict[str, Any] = {"size": SIZE, "steps": 4, "cfg": 1.0}
    if guidance == "own":
        values["guidance"], run["cfg"] = "own", 3.0

    def bias(patched: Any) -> Any:
        return laid_out(patched, layout, guidance_weight=0.3)

    def states(patched: Any, own: bool, **run: Any) -> list[Tensor]:
        calls: list[tuple[float, Tensor, Tensor | None]] = []
        sample(watched(patched, calls), **run)
        return [x[:1] for _, x, predicted in calls if not own or predicted is not None]

    both = bias(integrated(model, **values)) if layout_last else integrated(bias(model), **values)
    right = states(bias(model), False, **run, positive=auxiliary)
    # In its last step the branch is outside its window.
    for mine, theirs in zip(states(both, True, **run), right[:-1], strict=True):
        assert difference(mine, theirs) < 1e-4
    assert difference(states(integrated(model, **values), True, **run)[-1], right[-2]) > 0.001


@dataclass(frozen=True, eq=False)
class Notes(Edit):
    """Keeps the aggregation masks of a run, and which chunks were amended."""

    masks: list[tuple[float, Site, Tensor]] = field(default_factory=list)
    amended: list[tuple[float, str, bool]] = field(default_factory=list)

    def wants(self, chunk: Chunk) -> bool:
        return chunk.generated

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        self.amended.append((sigma, call.chunk.name, call.amended))
        self.masks.extend((sigma, call.site, n.maps()) for n in call.notes if n.name == "aggregation mask")


def noted(model: Any, run: dict[str, Any] | None = None, **values: Any) -> Notes:
    notes = Notes(frozenset(s for s in attention_sites(model) if s.kind == "cross"), Window())
    sample(add_edit(integrated(model, **values), notes), **{"size": SIZE, "batch": 2, **(run or {})})
    return notes


def test_masks_for_the_inspector(model: Any) -> None:
    notes = noted(model, {"steps": 4})
    assert {site for _, site, _ in notes.masks} == notes.sites
    # By the authors' rule no window has timestep 0 in it, which is the host's last step.
    assert len({sigma for sigma, *_ in notes.masks}) == 3
    for _, _, mask in notes.masks:
        assert mask.shape[:2] == (2, 1)
        assert mask.shape[2:] in (SIZE, (4, 5))
        assert bool((mask >= 0).all() and (mask <= 1).all())
        assert float(mask.max() - mask.min()) > 0.01
    last = min(sigma for sigma, *_ in notes.amended)
    assert {(name, amended) for sigma, name, amended in notes.amended if sigma > last} == {
        ("positive", True),
        ("negative", False),
    }
    assert not any(amended for sigma, _, amended in notes.amended if sigma == last)


def test_only_the_concepts_prompt_is_mixed(model: Any) -> None:
    both = [*known_prompt(), *prompt(4)]
    assert {(name, amended) for _, name, amended in noted(model, {"positive": both}).amended} == {
        ("positive", True),
        ("positive", False),
        ("negative", False),
    }
    with pytest.raises(ValueError, match="not the concept conditioning of Dual-Branch Integration"):
        sample(integrated(model), positive=prompt(1))


@pytest.mark.parametrize(("length", "other"), [(7, 21), (154, 77), (9, 7)])
def test_prompts_of_unequal_length(length: int, other: int, model: Any) -> None:
    patched = integrated(model, concept=known_prompt(1, length), auxiliary=auxiliary_prompt(9, other))
    run = {"positive": known_prompt(1, length), "size": SIZE}
    # The negative's length decides whether the host repeats the positive.
    tokens = prompt(2, length)[0][0]
    results = [sample(patched, negative=[[t, {}]], **run) for t in (tokens, tokens.repeat(1, 2, 1))]
    assert difference(*results) < 1e-4
    assert difference(results[0], sample(model, negative=[[tokens, {}]], **run)) > 0.01


def test_area_conditioning_takes_its_part_of_the_branch(model: Any) -> None:
    (tokens, values), *_ = known_prompt()
    positive = [*prompt(4), [tokens, {**values, "area": (4, 6, 2, 3)}]]
    notes = noted(model, {"positive": positive})
    assert {tuple(mask.shape[2:]) for *_, mask in notes.masks} == {(4, 6), (2, 3)}
    picture = torch.arange(70.0).view(1, 70, 1)
    chunk = Chunk(slice(0, 1), "positive", True, {}, SIZE, (4, 6, 2, 3))
    call = AttentionCall(picture[:, :24], picture, picture, 1, Site("cross", "middle", 0, 0), chunk, (4, 6))
    found = crop(picture, SIZE, call).view(4, 6)
    assert torch.equal(found, picture.view(7, 10)[2:6, 3:9])
    call.grid = (2, 3)
    assert torch.equal(crop(picture[:, :20], (4, 5), call).view(2, 3), picture[0, :20, 0].view(4, 5)[1:3, 2:5])


def custom(guider: Any, *prompts: Any, cfg: tuple[float, ...]) -> Tensor:
    guider.set_conds(*prompts)
    guider.set_cfg(*cfg)
    noise = latent_noise(1, SIZE, 5)
    with torch.inference_mode():
        sampler, sigmas = comfy.samplers.sampler_object("euler"), levels(guider.model_patcher, 4)
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=5)


@pytest.mark.parametrize("guidance", ["shared", "own"])
@pytest.mark.parametrize("kind", [Guider_DualCFG, Guider_PerpNeg])
def test_other_guiders(kind: Any, guidance: str, model: Any) -> None:
    prompts = (known_prompt(), prompt(3), prompt(2))
    plain = custom(kind(model), *prompts, cfg=(3.0, 2.0))
    result = custom(kind(integrated(model, guidance=guidance)), *prompts, cfg=(3.0, 2.0))
    assert result.isfinite().all()
    assert difference(result, plain) > 0.01


@pytest.mark.parametrize("guidance", ["shared", "own"])
def test_perp_neg_without_a_negative_prompt_guides_the_branch_too(guidance: str, model: Any) -> None:
    """By its empty prompt, as the host's plain guider does with that one for its negative."""
    patched = integrated(model, guidance=guidance)
    perp = custom(Guider_PerpNeg(patched), known_prompt(), prompt(3), prompt(2), cfg=(3.0, 0.0))
    plain = custom(comfy.samplers.CFGGuider(patched), known_prompt(), prompt(2), cfg=(3.0,))
    assert difference(perp, plain) < 1e-4


def test_a_branch_that_is_asked_for_late_begins_there(model: Any) -> None:
    """On a personalised model that takes over after some steps, its noise is that of the level."""
    calls: list[tuple[float, Tensor, Tensor | None]] = []
    patched = watched(integrated(model, end_percent=0.9, noise="the concept's"), calls)
    sigmas = levels(model, 4)
    guider = StepBlendedGuiderNode.execute(
        model=model,
        personalised_model=patched,
        positive=prompt(4),
        personalised_positive=known_prompt(),
        negative=prompt(2),
        first_steps=1,
        cfg=1.0,
        personalised_cfg=1.0,
    ).args[0]
    noise = latent_noise(1, SIZE, 5)
    with torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    sigma, state, _ = next(call for call in calls if call[2] is not None)
    assert sigma == float(sigmas[1])
    torch.testing.assert_close(state, noise * sigmas[1])
