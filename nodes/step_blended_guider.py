"""The Step-Blended Guider node: two models take turns in one sampling run (Layout-and-Retouch, section 3.2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sampler_helpers
import torch
from comfy.model_sampling import CONST
from comfy.samplers import KSAMPLER, CFGGuider, Sampler
from comfy_api.latest import io

from ..patches.mechanisms.step_plan import Call, StepPlan, Told, steps_of_calls
from .checks import check_number, prompt_in, sampled_prompt_in
from .types import CONCEPT

CFG_MAX = 100.0
STEPS_MAX = 10000
# Calls of a rehearsed model a step, after which a sampler is left to choose its own steps.
CALLS_MAX = 20
# Under these names a sampler asks the guider for more than its prediction.
_ASKED = ("sampler_post_cfg_function", "sampler_pre_cfg_function")


class StepBlendedGuiderNode(io.ComfyNode):
    """Makes a GUIDER of two MODELs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        cfg = {"default": 7.5, "min": 0.0, "max": CFG_MAX, "step": 0.1, "round": 0.01}
        return io.Schema(
            node_id="SubjectPatchesStepBlendedGuider",
            display_name="Step-Blended Guider",
            category=CONCEPT,
            description="Lets the vanilla model lay a picture out and a personalised model draw the rest: the first "
            "steps are the one's, the others the other's (Layout-and-Retouch). For SamplerCustomAdvanced.",
            search_aliases=["Layout-and-Retouch", "step-blended denoising", "two models", "refiner", "model switch"],
            inputs=[
                io.Model.Input("model", tooltip="The vanilla model, for the first steps."),
                io.Conditioning.Input("positive", tooltip="Its prompt: with a plain noun, without the concept's word."),
                io.Model.Input(
                    "personalised_model",
                    tooltip="The model for the other steps. With a LoRA or concept on the same checkpoint, both share "
                    "its memory.",
                ),
                io.Conditioning.Input("personalised_positive", tooltip="Its prompt: with the concept's word."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of both."),
                io.Int.Input(
                    "first_steps",
                    default=5,
                    min=0,
                    max=STEPS_MAX,
                    tooltip="How many steps are the vanilla model's (lambda1). The paper takes 5 of 50, or 3 for hard "
                    "prompts: more follows the prompt better, less keeps the subject better. Counted in each run: "
                    "where one run goes on with another's picture, give the later one 0.",
                ),
                io.Float.Input("cfg", **cfg, tooltip="The vanilla model's guidance scale."),
                io.Float.Input("personalised_cfg", **cfg, tooltip="The personalised model's guidance scale."),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        personalised_model: Any,
        personalised_positive: Any,
        negative: Any,
        first_steps: int,
        cfg: float,
        personalised_cfg: float,
    ) -> io.NodeOutput:
        check_number("cfg", cfg, 0.0, CFG_MAX)
        check_number("personalised_cfg", personalised_cfg, 0.0, CFG_MAX)
        check_number("first_steps", first_steps, 0, STEPS_MAX)
        _check_pair(model, personalised_model)
        sampled_prompt_in("positive", positive, model)
        sampled_prompt_in("personalised_positive", personalised_positive, personalised_model)
        for each, scale in ((model, cfg), (personalised_model, personalised_cfg)):
            # At CFG 1 the host leaves it out.
            if scale == 1:
                prompt_in("negative", negative)
            else:
                sampled_prompt_in("negative", negative, each)
        guider = StepBlendedGuider(model, personalised_model, first_steps)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        guider.second.set_conds(personalised_positive, negative)
        guider.second.set_cfg(personalised_cfg)
        return io.NodeOutput(guider)


def _check_pair(first: Any, second: Any) -> None:
    formats = [type(model.get_model_object("latent_format")).__name__ for model in (first, second)]
    if formats[0] != formats[1]:
        raise ValueError(
            f"The two models have different latents ({formats[0]} and {formats[1]}); take a personalised model of the "
            "same family."
        )
    if len({isinstance(model.get_model_object("model_sampling"), CONST) for model in (first, second)}) > 1:
        raise ValueError(
            "Only one of the two models is a flow model, so they cannot share steps; take two of one kind."
        )


class StepBlendedGuider(CFGGuider):
    """The host's guider for the first `first_steps` steps of a run, and for the others `second`, another one.

    Both runs are the host's own, one inside the other, so that each model's wrappers, hooks and patches see a run of
    their model. A step that calls the model several times is all of the model that it began with."""

    def __init__(self, first: Any, second: Any, first_steps: int) -> None:
        super().__init__(first)
        # Each has hooks of its own: of one MODEL twice the runs would take away each other's. Of a dynamic one the host
        # takes a copy for each guider that has any, of a model that it keeps with this very object.
        apart = second is first and not second.is_dynamic()
        self.second = CFGGuider(second.clone() if apart else second)
        self.first_steps = first_steps
        self._plan: StepPlan | None = None
        self._second_options: dict[str, Any] = {}
        self._in_use: CFGGuider = self

    def sample(
        self,
        noise: Any,
        latent_image: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any = None,
        callback: Any = None,
        disable_pbar: bool = False,
        seed: Any = None,
    ) -> Any:
        """As the host's. Raises ValueError when there are fewer steps than the first model's."""
        count = len(sigmas) - 1
        if self.first_steps > max(count, 0):
            raise ValueError(
                f"The first_steps of Step-Blended Guider are {self.first_steps} but the sampler takes {max(count, 0)} "
                "steps; lower one or raise the other."
            )
        given = (denoise_mask, callback, disable_pbar, seed)
        if self.first_steps == 0:
            return self.second.sample(noise, latent_image, sampler, sigmas, *given)
        if self.first_steps == count:
            return CFGGuider.sample(self, noise, latent_image, sampler, sigmas, *given)
        results = []

        def within(options: dict[str, Any]) -> None:
            self._second_options = options
            # The inner run loads its model when it begins.
            self._in_use = self
            results.append(CFGGuider.sample(self, noise, latent_image, sampler, sigmas, *given))

        try:
            self.second.sample(noise, latent_image, _Within(within), sigmas, denoise_mask, None, True, seed)
        finally:
            self._plan, self._second_options, self._in_use = None, {}, self
        return results[0]

    def inner_sample(
        self, noise: Any, latent_image: Any, device: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
    ) -> Any:
        seed = args[3] if len(args) > 3 else kwargs.get("seed")
        steps = _rehearsed(self, sampler, sigmas, seed, bool(noise.any())) if self._second_options else None
        self._plan = StepPlan(tuple(sigmas.tolist()), steps)
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, *args, **kwargs)

    def outer_predict_noise(
        self, x: Any, timestep: Any, model_options: dict[str, Any] | None = None, seed: Any = None
    ) -> Any:
        options = model_options or {}
        if not self._second_options or self._plan.next(float(timestep[0])) < self.first_steps:
            self._use(self, x)
            return super().outer_predict_noise(x, timestep, options, seed)
        self._use(self.second, x)
        return self.second.outer_predict_noise(
            x, timestep, _asking(self._second_options, options, self.model_options), seed
        )

    def _use(self, guider: CFGGuider, x: Any) -> None:
        """Loads the model of a guider whose run has begun."""
        if guider is self._in_use:
            return
        # Hooks of one prompt must not stay in weights that the two models share.
        self._in_use.model_patcher.unpatch_hooks()
        comfy.sampler_helpers.prepare_sampling(guider.model_patcher, x.shape, guider.conds, guider.model_options)
        guider.model_patcher.pre_run()
        self._in_use = guider


class _Within(Sampler):
    """Does something inside a guider's run, in the place of sampling, given the run's options."""

    def __init__(self, act: Callable[[dict[str, Any]], None]) -> None:
        self.act = act

    def sample(
        self,
        model_wrap: Any,
        sigmas: Any,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Any,
        latent_image: Any = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Any:
        self.act(extra_args["model_options"])
        return noise


def _asking(options: dict[str, Any], given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A run's options with what the sampler added to those of the other run."""
    asking = dict(options)
    for name in _ASKED:
        known = {id(function) for function in own.get(name, ())}
        added = [function for function in given.get(name, ()) if id(function) not in known]
        if added:
            asking[name] = [*options.get(name, ()), *added]
            asking["disable_cfg1_optimization"] = given.get("disable_cfg1_optimization", False)
    return asking


class _Enough(Exception):
    """A sampler called the rehearsed model more often than a sampler with steps does."""


class _Rehearsal:
    """Stands in a sampler's place of the model: predicts zeros and writes the calls down."""

    def __init__(self, guider: CFGGuider, most: int) -> None:
        self.inner_model = guider.inner_model
        self.model_patcher = guider.model_patcher
        self.cfg = guider.cfg
        self.most = most
        self.events: list[Call | Told] = []

    def __call__(self, x: Any, timestep: Any, model_options: dict[str, Any] | None = None, seed: Any = None) -> Any:
        if len(self.events) >= self.most:
            raise _Enough
        self.events.append(Call(float(timestep[0])))
        zeros = torch.zeros_like(x)
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            zeros = function(
                {
                    "denoised": zeros,
                    "cond_denoised": zeros,
                    "uncond_denoised": zeros,
                    "cond": None,
                    "uncond": None,
                    "cond_scale": self.cfg,
                    "model": self.inner_model,
                    "sigma": timestep,
                    "model_options": model_options,
                    "input": x,
                }
            )
        return zeros

    def told(self, step: int, *_: Any) -> None:
        self.events.append(Told(step))


def _rehearsed(guider: CFGGuider, sampler: Any, sigmas: Any, seed: Any, adds_noise: bool) -> tuple[int, ...] | None:
    """The step of each call that a sampler will make; None where that cannot be known before. `adds_noise` says whether
    its run begins with noise, which a sampler may go by."""
    if not isinstance(sampler, KSAMPLER):
        return None
    rehearsal = _Rehearsal(guider, 2 * CALLS_MAX * len(sigmas))
    nothing = torch.zeros(1, guider.inner_model.latent_format.latent_channels, 1, 1, device=sigmas.device)
    noise = torch.ones_like(nothing) if adds_noise else nothing.clone()
    options = {"transformer_options": {"sample_sigmas": sigmas}}
    devices = [sigmas.device] if sigmas.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            # A sampler may write into its levels, as uni_pc does.
            sampler.sample(
                rehearsal, sigmas.clone(), {"model_options": options, "seed": seed}, rehearsal.told, noise, nothing,
                disable_pbar=True,
            )  # fmt: skip
        except _Enough:
            return None
    return steps_of_calls(rehearsal.events, sigmas.tolist())
