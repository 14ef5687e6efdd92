"""The guidance of a branch that denoises by itself: the generation's, as the host's post-CFG function tells it."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from torch import Tensor

from .denoising import Denoising
from .passes import predict
from .recording import Recording
from .session import Session


def looks_beside(guider: Any, model_options: dict[str, Any]) -> bool:
    """Whether a sampler looks at the predictions beside the guided one, as those by CFG++ do."""
    own = guider.model_options.get("sampler_post_cfg_function", ())
    return any(
        all(function is not known for known in own) for function in model_options.get("sampler_post_cfg_function", ())
    )


def guidance_of(seen: dict[str, Any]) -> dict[str, Any] | None:
    """What a guider says of its unconditional prediction; None of one that leaves it out, and so does not guide."""
    if seen["uncond"] is not None:
        return seen
    # Perp-Neg without its negative prompt guides by its empty one.
    if seen.get("empty_cond") is None:
        return None
    return {**seen, "uncond": seen["empty_cond"], "uncond_denoised": seen["empty_cond_denoised"]}


def guide_branch(
    session: Session,
    branch: Denoising,
    guidance: dict[str, Any],
    timestep: Tensor,
    options: dict[str, Any],
    plus: bool,
) -> None:
    """Gives a branch the generation's guidance at this noise level: its unconditional prediction, or one for the
    branch's own latents. A sampler may change the size of its own; the branch keeps the one it began with, and what
    was predicted for another is of no use to it."""
    latents, unconditional = guidance["input"], guidance["uncond_denoised"]
    if branch.own_guidance or latents.shape != branch.shape:
        if branch.is_guided(session.sigma):
            return
        latents = branch.latents(session.sigma, session.noise_scaling).to(timestep)
        conditioning = session.stripped(branch, session.in_force(guidance["uncond"]))
        recording = Recording(branch, (), None, session.run)
        unconditional = predict(session, recording, conditioning, latents, timestep, session.sigma, options)
    scale, rule = guidance["cond_scale"], options.get("sampler_cfg_function")

    def guide(conditioned: Tensor, without: Tensor, x: Tensor) -> Tensor:
        given = {"sampler_cfg_function": rule, "transformer_options": options.get("transformer_options", {})}
        return comfy.samplers.cfg_function(
            session.guider.inner_model, conditioned, without, scale, x, timestep, given,
            guidance["cond"], guidance["uncond"],
        )  # fmt: skip

    branch.guided(session.sigma, scale, latents, unconditional, plus, None if rule is None else guide)
