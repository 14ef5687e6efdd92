"""The host's samplers, as tests of random weights run them."""

from __future__ import annotations

from functools import partial
from typing import Any

import comfy.samplers
from torch import Tensor


def sampler_for(name: str, tolerance: float) -> dict[str, Any]:
    """What `sample` is given for a sampler of the host; the `tolerance` is dpm_adaptive's."""
    return {"function": partial(adaptive, tolerance)} if name == "dpm_adaptive" else {"sampler": name}


def adaptive(tolerance: float, *given: Any, **more: Any) -> Tensor:
    """dpm_adaptive with a tolerance of its own: with its usual one it takes hundreds of steps over random weights. Its
    first are too long, so that some are refused, and begin again where they began."""
    sampler = comfy.samplers.ksampler("dpm_adaptive").sampler_function
    result, info = sampler(*given, rtol=tolerance, atol=tolerance, h_init=3.0, return_info=True, **more)
    assert info["n_reject"] > 0
    return result
