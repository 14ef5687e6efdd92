"""Invert to Trajectory: a picture's way back to noise with every latent kept (Layout-and-Retouch)."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy.samplers import CFGGuider, Sampler
from comfy_api.latest import io

from ..patches.families import family_of
from ..patches.mechanisms.inversion import CACHE_MEGABYTES, Inversion, drift_report, inverted, replayed
from ..patches.mechanisms.subject import mask_bounds
from ..patches.parts.cache import MEGABYTE, FeatureCache
from ..patches.parts.process import Process
from .checks import (
    MEGABYTES_MAX,
    check_each,
    check_number,
    latents_in,
    masks_in,
    sampled_prompt_in,
    tell_upside_down,
)
from .inputs import ADVANCED, cache_input, model_input
from .types import RETOUCH, TrajectoryType

ROUNDS_MAX = 20


class InvertToTrajectoryNode(io.ComfyNode):
    """Makes a TRAJECTORY of a LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesInvertToTrajectory",
            display_name="Invert to Trajectory",
            category=RETOUCH,
            description="Walks a picture's latents back to noise by DDIM inversion and keeps all of them, for "
            "Multi-Source Attention Swap (Layout-and-Retouch).",
            search_aliases=["DDIM inversion", "inversion", "unsampler", "Layout-and-Retouch"],
            inputs=[
                model_input(),
                io.Latent.Input("latent", tooltip="The encoded picture; several are inverted together."),
                io.Sigmas.Input(
                    "sigmas",
                    tooltip="From any scheduler node; the same as the sampler's are best. Latents between two of them "
                    "are interpolated.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Encodes the empty prompt, the paper's, if no conditioning is given."
                ),
                io.Conditioning.Input("conditioning", optional=True, tooltip="A prompt to invert with, at CFG 1."),
                io.Int.Input(
                    "fixed_point_rounds",
                    default=0,
                    min=0,
                    max=ROUNDS_MAX,
                    **ADVANCED,
                    tooltip="For inversions that drift: more turns of each step until it leads back to where it came "
                    "from. Each costs another pass a step; 0 is plain DDIM inversion, 3 is often enough.",
                ),
                io.Boolean.Input(
                    "measure_replay",
                    default=False,
                    **ADVANCED,
                    tooltip="Also replays the inversion and reports how far it drifts, which takes another pass a "
                    "step. The kept latents do not drift.",
                ),
                cache_input(CACHE_MEGABYTES),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the subject is. As a reference of Multi-Source Attention Swap only what is "
                    "inside lends its keys and values; to a layout it means nothing. One for all pictures, or one for "
                    "each.",
                ),
            ],
            outputs=[
                TrajectoryType.Output(display_name="trajectory", tooltip="All the latents, with their sigmas."),
                io.Latent.Output(
                    display_name="last_latent",
                    tooltip="The noisiest latent: sample from it with DisableNoise to start where the picture ended. "
                    "With a flow model take the noise instead.",
                ),
                io.String.Output(display_name="report", tooltip="How exactly the trajectory gives the picture back."),
                io.Noise.Output(
                    display_name="noise",
                    tooltip="What the picture ended in, as noise: give it to SamplerCustomAdvanced with an empty "
                    "latent and the same sigmas to start there. For every model, also flow models such as FLUX.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        latent: dict[str, Any],
        sigmas: Any,
        clip: Any = None,
        conditioning: Any = None,
        fixed_point_rounds: int = 0,
        measure_replay: bool = False,
        cache_megabytes: int = CACHE_MEGABYTES,
        mask: Any = None,
    ) -> io.NodeOutput:
        family = family_of(model).name
        check_number("fixed_point_rounds", fixed_point_rounds, 0, ROUNDS_MAX)
        model_sampling, latent_format = model.get_model_object("model_sampling"), model.model.latent_format
        check_number("cache_megabytes", cache_megabytes, 0, MEGABYTES_MAX)
        levels = falling(sigmas, float(model_sampling.sigma_min))
        clean = latents_in("latent", latent, latent_format.latent_channels, latent_format.latent_dimensions > 2)
        mask = None if mask is None else _subjects_masks(mask, len(clean))
        if sampled_prompt_in("conditioning", conditioning, model) is None:
            if clip is None:
                raise ValueError(
                    "There is no prompt to invert with; connect a CLIP, whose empty prompt is used, or one."
                )
            empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
            conditioning = sampled_prompt_in("CLIP's empty prompt", empty, model)
        guider = CFGGuider(model)
        guider.inner_set_conds({"positive": conditioning})
        sampler = _Inverting(fixed_point_rounds, measure_replay, Process.of(model_sampling))
        passes = (len(levels) - 1) * (1 + fixed_point_rounds + measure_replay)
        guider.sample(
            torch.zeros_like(clean),
            clean,
            sampler,
            levels,
            callback=latent_preview.prepare_callback(model, passes),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=0,
        )
        if not bool(sampler.states.isfinite().all()):
            raise ValueError(
                "The inversion led to latents that are no numbers; take fewer fixed_point_rounds, or a model or VAE in "
                "fp32."
            )
        inversion = Inversion(levels.cpu(), sampler.states, family, FeatureCache(cache_megabytes * MEGABYTE), mask)
        last = model.model.process_latent_out(inversion.states[0])
        last = last.to(comfy.model_management.intermediate_device())
        report = drift_report(inversion, sampler.replay)
        return io.NodeOutput(inversion, {"samples": last}, report, StartNoise(inversion, model_sampling))


def _subjects_masks(mask: Any, pictures: int) -> torch.Tensor:
    """Masks of the subject in so many pictures, (1 or pictures, height, width) on the CPU. Raises ValueError for
    another number of them and for an empty one."""
    masks = masks_in("mask", mask).cpu()
    check_each("masks", len(masks), pictures, "pictures in the latent")
    for number, each in enumerate(masks, 1):
        mask_bounds(each, 0.0)
        tell_upside_down(f"mask {number} of {len(masks)}", each)
    return masks


def falling(sigmas: Any, least: float = 0.0) -> Any:
    """SIGMAS as a path needs them, in memory of their own: falling, whichever way they were given, and down to 0, where
    the picture is. A last level that is below `least`, the model's lowest, is 0: the host's uni_pc writes one into the
    SIGMAS it was given.

    Raises ValueError for fewer than two, or when they go up and down."""
    levels = sigmas.float().flatten().clone()
    if len(levels) > 1 and levels[0] < levels[-1]:
        levels = levels.flip(0)
    if len(levels) and 0 < levels[-1] < least * (1 - 1e-4):
        levels[-1] = 0
    if len(levels) and levels[-1] > 0:
        levels = torch.cat([levels, levels.new_zeros(1)])
    if len(levels) < 2 or not bool((levels.diff() < 0).all()) or not bool(levels.isfinite().all()):
        given = ", ".join(f"{level:.4g}" for level in sigmas.flatten().tolist()[:8]) or "none"
        raise ValueError(f"The sigmas ({given}) are no schedule; connect those of a scheduler node, all of them.")
    return levels


class StartNoise:
    """A NOISE of the host's: what a sampler adds to an empty latent to begin with a trajectory's noisiest state."""

    seed = 0

    def __init__(self, inversion: Inversion, model_sampling: Any) -> None:
        sigma, most = float(inversion.sigmas[0]), float(model_sampling.sigma_max)
        # The host's samplers begin so: at its highest noise level a diffusion's noise is scaled for the whole range.
        whole = math.isclose(sigma, most, rel_tol=1e-5) or sigma > most
        level, state = torch.tensor(sigma), inversion.states[0]
        self.noise = state / model_sampling.noise_scaling(level, torch.ones(1), torch.zeros(1), whole)

    def generate_noise(self, input_latent: dict[str, Any]) -> torch.Tensor:
        """The noise for as many pictures as the latent has. Raises ValueError where these are of another size, or
        several that are another number than several inverted ones."""
        asked, kept = input_latent["samples"].shape, self.noise.shape
        rows = asked[0]
        if asked[-2:] != kept[-2:] or len({1, rows, kept[0]}) > 2:
            raise ValueError(
                f"The trajectory's noise has the shape {tuple(kept)} but the sampler's latent {tuple(asked)}; give the "
                "sampler an empty latent for as many pictures as were inverted, of their size."
            )
        return self.noise.expand(rows, *self.noise.shape[1:]) if len(self.noise) == 1 else self.noise


class _Inverting(Sampler):
    """Walks up the sigmas instead of down. Leaves the states it went through, and those of a replay if asked for."""

    def __init__(self, rounds: int, replay: bool, process: Process) -> None:
        self.rounds = rounds
        self.measure = replay
        self.process = process
        self.states: Any = None
        self.replay: Any = None

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
        steps = (len(sigmas) - 1) * (1 + self.rounds + self.measure)
        done = 0

        def predict(x: Any, sigma: float) -> Any:
            return model_wrap(x, sigmas.new_full((len(x),), sigma), **extra_args)

        def told(clean: Any, x: Any) -> None:
            nonlocal done
            if callback is not None:
                callback(done, clean, x, steps)
            done += 1

        states = inverted(predict, latent_image, sigmas, self.rounds, told, self.process)
        self.states = states.float().cpu()
        if self.measure:
            self.replay = replayed(predict, states[0], sigmas, told).float().cpu()
        return states[0]
