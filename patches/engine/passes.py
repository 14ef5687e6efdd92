"""The passes of the model over companion streams: one for a stream at a noise level, unless its cache has all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

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
    recording.finish(comfy.model_management.unet_offload_device())


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


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Keeps a pass from the random numbers of the generation. Patches that draw some (ToMe) would else give another
    picture when the pass is not needed, and other features after another picture's draws. Every generator that is
    seeded is given its state back, so that no device is seeded whose generator PyTorch does not give."""
    generators = [torch.default_generator]
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        generators.append(module.default_generators[module.current_device() if device.index is None else device.index])
    states = [each.get_state() for each in generators]
    try:
        for each in generators:
            each.manual_seed(0)
        yield
    finally:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)
