"""Windows are shares of a run's own schedule: at any denoise, in split runs, under any scheduler; one without a step in
it says so."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from typing import Any

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from subject_patches.nodes.self_recurrence import SelfRecurrenceNode
from subject_patches.patches.mechanisms.inversion import Inversion
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.window import Schedule, Window, percent_of
from subject_patches.tests.shared.layouts import box
from subject_patches.tests.shared.models import (
    integrated,
    known_prompt,
    laid_out,
    latent_noise,
    prompt,
    randn,
    recycled,
    sample,
    small_model,
    swapped,
    through,
    trajectory,
)
from torch import Tensor

SIZE = (6, 8)


def part(model: Any, first: int, last: int, steps: int = 10, scheduler: str = "normal") -> Tensor:
    """The noise levels from step `first` to step `last` of `steps`, as KSamplerAdvanced and SplitSigmas cut them."""
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)
    return sigmas[first : last + 1]


def run(
    model: Any, sigmas: Tensor, adds_noise: bool = True, latent: Tensor | None = None, sampler: Any = None
) -> Tensor:
    """What SamplerCustomAdvanced does, from an image or, without noise, on with another run's latent."""
    noise = latent_noise(1, SIZE, 5)
    latent = randn(1, 4, *SIZE, seed=3) if latent is None else latent
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(known_prompt(), prompt(2))
    guider.set_cfg(3.0)
    sampler = comfy.samplers.sampler_object("euler") if sampler is None else sampler
    with torch.inference_mode():
        return guider.sample(noise if adds_noise else noise * 0, latent, sampler, sigmas, disable_pbar=True, seed=5)


def counted(model: Any) -> tuple[Any, Callable[[], list[int]]]:
    """A clone, and what tells how many rows the model saw at each noise level, from the highest on."""
    calls: dict[float, int] = {}

    def count(apply: Callable[..., Tensor], x: Tensor, sigma: Tensor, **values: Any) -> Tensor:
        level = float(sigma[0])
        calls[level] = calls.get(level, 0) + len(x)
        return apply(x, sigma, **values)

    return through(model, count), lambda: [calls[level] for level in sorted(calls, reverse=True)]


# The schedule


@pytest.mark.parametrize("kind", ["discrete", "zero terminal SNR", "continuous EDM", "flow"])
def test_percent_of_is_the_hosts_percent_backwards(kind: str) -> None:
    sampling = {
        "discrete": comfy.model_sampling.ModelSamplingDiscrete,
        "zero terminal SNR": lambda: comfy.model_sampling.ModelSamplingDiscrete(zsnr=True),
        "continuous EDM": comfy.model_sampling.ModelSamplingContinuousEDM,
        "flow": lambda: comfy.model_sampling.ModelSamplingDiscreteFlow(),
    }[kind]()
    for share in (0.0, 0.03, 0.2, 0.5, 0.8, 0.97):
        assert percent_of(float(sampling.percent_to_sigma(share)), sampling.percent_to_sigma) == pytest.approx(
            share, abs=1e-3
        )
    assert percent_of(float(sampling.sigma_max), sampling.percent_to_sigma) == 0
    assert percent_of(0.0, sampling.percent_to_sigma) == pytest.approx(1)


@pytest.mark.parametrize(
    "scheduler", ["normal", "karras", "simple", "sgm_uniform", "exponential", "beta", "kl_optimal"]
)
def test_a_run_from_the_top_has_the_hosts_percent(scheduler: str, model: Any) -> None:
    sampling = model.get_model_object("model_sampling")
    sigmas = part(model, 0, 20, 20, scheduler).tolist()
    schedule = Schedule.of_run(max(sigmas), True, sampling.percent_to_sigma)
    assert schedule.begins == 0
    assert schedule.sigma(0.4) == sampling.percent_to_sigma(0.4)
    assert schedule.sigma(1) == 0


def test_a_run_from_an_image_has_a_schedule_of_its_own(model: Any) -> None:
    sampling = model.get_model_object("model_sampling")
    # Denoise 0.5 of 10 steps is the last 10 of 20.
    highest = float(part(model, 10, 20, 20)[0])
    schedule = Schedule.of_run(highest, True, sampling.percent_to_sigma)
    begins = percent_of(highest, sampling.percent_to_sigma)
    assert 0.4 < begins < 0.6
    assert schedule.sigma(0.5) == pytest.approx(sampling.percent_to_sigma(begins + 0.5 * (1 - begins)))
    # Without noise of its own it goes on with a picture: of a schedule from the top, or from where that is known.
    assert Schedule.of_run(highest, False, sampling.percent_to_sigma).begins == 0
    assert Schedule.of_run(highest, False, sampling.percent_to_sigma, highest).begins == begins
    assert Schedule.of_run(highest, False, sampling.percent_to_sigma, 1e9).begins == 0


# Runs


@pytest.mark.parametrize(
    ("first", "mixed"), [(0, 2), (2, 2), (5, 1), (9, 1)], ids=["denoise 1", "denoise 0.8", "denoise 0.5", "denoise 0.1"]
)
def test_the_branch_runs_in_the_first_part_of_an_image_to_image_run(first: int, mixed: int, model: Any) -> None:
    patched, rows = counted(integrated(model, end_percent=0.2))
    run(patched, part(model, first, 10))
    assert rows() == [3] * mixed + [2] * (10 - first - mixed)


@pytest.mark.parametrize("scheduler", ["karras", "exponential", "sgm_uniform", "simple", "ddim_uniform"])
@pytest.mark.parametrize("first", [4, 19])
def test_the_branch_runs_first_under_every_schedule(scheduler: str, first: int, model: Any) -> None:
    patched, rows = counted(integrated(model, end_percent=0.05))
    run(patched, part(model, first, 20, 20, scheduler))
    assert rows()[0] == 3


def test_a_split_run_mixes_what_one_run_mixes(model: Any) -> None:
    """The second half adds no noise, so the window stays of the whole."""
    counts = []
    for cuts in ([0, 10], [0, 3, 10]):
        patched, rows = counted(integrated(model, end_percent=0.6))
        for begin, end in itertools.pairwise(cuts):
            run(patched, part(model, begin, end), adds_noise=begin == 0)
        counts.append(rows())
    assert counts[0] == counts[1]
    assert counts[0].count(3) == 6


def test_the_swaps_phases_divide_the_paths_schedule(model: Any) -> None:
    """In a run with noise of its own, and in one that goes on from the path's first latent or from a later one."""
    sigmas = part(model, 4, 10)
    kept = randn(1, 4, *SIZE, seed=8) + sigmas.view(-1, 1, 1, 1, 1) * randn(1, 4, *SIZE, seed=9)
    for adds_noise, begin in ((True, 0), (False, 0), (False, 1)):
        path = Inversion(sigmas, kept, "SD 1.x")
        patched, rows = counted(swapped(model, layout=path, lambda2=0.5, apply_to="cond only"))
        run(patched, sigmas[begin:], adds_noise, kept[begin])
        count = 3 - begin
        assert rows() == [3] * count + [2] * (6 - begin - count)


@pytest.mark.parametrize("mechanism", ["recycled", "laid out"])
def test_every_window_is_of_the_runs_own_schedule(mechanism: str, model: Any) -> None:
    def patched(start: float, end: float) -> Any:
        if mechanism == "recycled":
            return recycled(model, start_percent=start, end_percent=end)
        layout = Layout(8, 6, (Region("subject", box(8, 6, 0, 0, 4, 6)), Region("scene", box(8, 6, 4, 0, 8, 6))))
        return laid_out(model, layout, start_percent=start, end_percent=end)

    sigmas = part(model, 6, 10)
    windows = ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.0, 0.0))
    results = [run(patched(*window), sigmas) for window in windows]
    for one, other in itertools.combinations(results, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize(("adds_noise", "more"), [(True, 1), (False, 0)])
def test_self_recurrence_recurs_in_the_runs_own_first_part(
    adds_noise: bool, more: int, model: Any, caplog: Any
) -> None:
    counting, rows = counted(model)
    sampler = SelfRecurrenceNode.execute(comfy.samplers.sampler_object("euler"), 2, 0.0, 0.2, 0).args[0]
    with caplog.at_level(logging.WARNING):
        run(counting, part(model, 5, 10), adds_noise, sampler=sampler)
    assert rows() == [2 + 2 * more] + [2] * 4
    assert sum("Self-Recurrence Sampler did nothing" in r.message for r in caplog.records) == 1 - more


# Windows without a step


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (lambda m: integrated(m, end_percent=0.1), "Dual-Branch Integration did nothing"),
        (lambda m: recycled(m, start_percent=0.0, end_percent=0.1), "Recycled Self-Attention did nothing"),
        (lambda m: recycled(m, start_percent=0.98, end_percent=1.0), None),
    ],
)
def test_a_window_without_a_step_says_so_once(
    patch: Callable[[Any], Any], said: str | None, model: Any, caplog: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        run(patch(model), part(model, 5, 10), adds_noise=False)
    spoken = [record.message for record in caplog.records if "did nothing" in record.message]
    assert len(spoken) == (said is not None)
    if said:
        assert said in spoken[0]
        assert "5 steps" in spoken[0]
        assert "goes on with another's picture" in spoken[0]


def test_a_window_with_a_step_says_nothing(model: Any, caplog: Any) -> None:
    path = trajectory(randn(1, 4, *SIZE, seed=8))
    with caplog.at_level(logging.WARNING):
        run(integrated(model, end_percent=0.1), part(model, 8, 10))
        run(recycled(model, end_percent=0.1), part(model, 0, 10))
        run(swapped(model, path, path, lambda2=0.0), part(model, 2, 10))
    assert not [record for record in caplog.records if "did nothing" in record.message]


def test_windows_that_meet_keep_their_origin() -> None:
    assert (Window(0.0, 0.5, 3.0) & Window(0.2, 1.0)) == Window(0.2, 0.5, 3.0)
    assert (Window(0.0, 0.2) | Window(0.5, 0.9, 3.0)) == Window(0.0, 0.9, 3.0)


def test_a_run_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    """One line a node: steps, layers, companions, and passes that the cache saved, which are all of a second run."""
    model = recycled(small_model(), end_percent=0.5)
    for saved in (0, 2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            sample(model, steps=4)
        (line,) = [record.message for record in caplog.records if record.message.startswith("Recycled")]
        expected = rf"Recycled Self-Attention: 2 steps, 5 layers, 1 companion, {saved} of 2 passes from the cache\."
        assert re.fullmatch(expected, line), line
