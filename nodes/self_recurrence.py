"""The Self-Recurrence Sampler node: a SAMPLER that does each step more than once (Cones 2)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from comfy.samplers import KSAMPLER
from comfy_api.latest import io
from tqdm.auto import tqdm

from ..patches.mechanisms.self_recurrence import recur, row_noise
from ..patches.parts.process import Process
from ..patches.parts.window import Levels, Window
from .checks import check_number
from .inputs import seed_input, window_inputs
from .types import LAYOUT

TURNS_MAX = 10
# Those of the host's samplers that remember nothing from one step to the next.
SAMPLERS = (
    "euler",
    "euler_ancestral",
    "euler_cfg_pp",
    "euler_ancestral_cfg_pp",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
)


class SelfRecurrenceNode(io.ComfyNode):
    """Wraps a SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesSelfRecurrence",
            display_name="Self-Recurrence Sampler",
            category=LAYOUT,
            description="Does each step of a sampler more than once, noising back in between, so that a layout takes "
            "hold better (Cones 2's code). Sampling takes as many times as long. For SamplerCustom nodes.",
            search_aliases=["Cones 2", "time travel", "resampling", "recurrence", "restart sampler"],
            inputs=[
                io.Sampler.Input("sampler", tooltip=f"From KSamplerSelect, one of: {', '.join(SAMPLERS)}."),
                io.Int.Input(
                    "turns",
                    default=2,
                    min=1,
                    max=TURNS_MAX,
                    tooltip="How often each step is done. 2 is the authors'; 1 is the sampler as it is.",
                ),
                *window_inputs(),
                seed_input(),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom nodes.")],
        )

    @classmethod
    def execute(
        cls, sampler: Any, turns: int, start_percent: float, end_percent: float, seed: int = 0
    ) -> io.NodeOutput:
        check_number("turns", turns, 1, TURNS_MAX)
        window = Window(start_percent, end_percent)
        function = getattr(sampler, "sampler_function", None)
        name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
        if type(sampler) is not KSAMPLER or name not in SAMPLERS:
            raise ValueError(
                f"The sampler {name} cannot be done one step at a time; choose one of {', '.join(SAMPLERS)}."
            )
        if sampler.extra_options.get("s_churn", 0) > 0:
            raise ValueError("The sampler has s_churn, which adds noise of its own to each step; set it to 0.")
        if turns == 1 or window.empty:
            return io.NodeOutput(sampler)
        wrapped = KSAMPLER(_recurrent(function, window, turns, seed), sampler.extra_options, sampler.inpaint_options)
        return io.NodeOutput(wrapped)


def _recurrent(function: Callable[..., Any], window: Window, turns: int, seed: int) -> Callable[..., Any]:
    """A sampler function of the host's kind, around one of its own."""
    stochastic = "noise_sampler" in inspect.signature(function).parameters

    def sample(
        model: Any,
        x: Any,
        sigmas: Any,
        extra_args: Any = None,
        callback: Any = None,
        disable: Any = None,
        **options: Any,
    ) -> Any:
        model_sampling = model.inner_model.inner_model.model_sampling
        # The host gives the run's own noise along, which is all zeros in a run that adds none.
        noise = getattr(model, "noise", None)
        adds_noise = noise is None or bool(noise.any())
        run = Levels(tuple(sigmas.tolist()), adds_noise, model_sampling.percent_to_sigma)
        if not any(run.lie_in(window, sigma) for sigma in run.sigmas[:-1]):
            logging.warning(f"Self-Recurrence Sampler did nothing: {run.none_in(window)}")
        process = Process.of(model_sampling)
        bar = tqdm(total=len(sigmas) - 1, disable=disable)

        def step(x: Any, levels: Any, number: int, turn: int) -> Any:
            def told(state: dict[str, Any]) -> None:
                if callback is not None:
                    callback({**state, "i": number})

            # Each call of an ancestral sampler would otherwise begin its noise anew, with the same.
            own = {"noise_sampler": lambda *_: row_noise(x, seed, "step", number, turn)} if stochastic else {}
            x = function(model, x, levels, extra_args=extra_args, callback=told, disable=True, **{**own, **options})
            if turn == 0:
                bar.update()
            return x

        def turns_at(sigma: float) -> int:
            return turns if run.lie_in(window, sigma) else 1

        with bar:
            return recur(step, x, sigmas, turns_at, lambda x, *place: row_noise(x, seed, "back", *place), process)

    return sample
