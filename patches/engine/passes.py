"""The passes of the model over companion streams: one for a stream at a noise level, unless its cache has all of it."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.samplers
from torch import Tensor

from ..parts.randomness import own_randomness
from ..parts.sites import Site
from .companion import OfThePictureError
from .recording import Recording
from .session import Session
from .streams import Stream

# In the options of a pass: its Recording.
RECORDING = "subject_patches_recording"


def run_stream(
    session: Session,
    stream: Stream,
    sites: frozenset[Site],
    parts: tuple[str, ...],
    timestep: Tensor,
    options: dict[str, Any],
) -> None:
    recording = session.recording(stream, sites, parts, options, timestep.device)
    if recording.complete:
        return
    level = session.level(stream)
    latents = stream.latents(level, session.noise_scaling).to(timestep)
    conditioning, _ = session.stream_conditioning(stream)
    prediction = predict(session, recording, conditioning, latents, timestep, level, options)
    stream.denoised(level, prediction)
    recording.finish(comfy.model_management.intermediate_device())


def predict(
    session: Session,
    recording: Recording,
    conditioning: list[dict[str, Any]],
    latents: Tensor,
    timestep: Tensor,
    level: float,
    options: dict[str, Any],
) -> Tensor:
    """A companion's pass at a noise level: the model's prediction of its clean latents. Where another pack's patch
    turns out to belong to the picture, the pass begins again without it; so what a pass gives does not depend on which
    passes were needed before."""
    sigma = timestep.new_full((len(latents),), level)
    conditioning = session.at_level(conditioning, level, timestep, options)
    given = {**options, "transformer_options": {**options["transformer_options"], RECORDING: recording}}
    while True:
        try:
            with own_randomness(timestep.device):
                return comfy.samplers.calc_cond_batch(
                    session.guider.inner_model, [conditioning], latents, sigma, given
                )[0]  # fmt: skip
        except OfThePictureError as found:
            recording.begin_again(found.owner)
