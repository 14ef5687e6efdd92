"""DDIM inversion with every latent kept (Layout-and-Retouch, section 3.2.2 and Algorithm 1, lines 2 and 3).

Latents are the host's, in which a DDIM step is a straight line in sigma: of a diffusion, clean latents plus sigma times
noise, and of a flow as well, whose Euler step it is. A path that is kept whole is exact: what a replay would drift away
from is read instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..engine.streams import Trajectory
from ..parts.cache import MEGABYTE, FeatureCache
from ..parts.process import DIFFUSION, Process

FORMAT = "subject patches trajectory"
CACHE_MEGABYTES = 4096
# (latents, sigma) -> the model's prediction of the clean latents
Predict = Callable[[Tensor, float], Tensor]
# Told after every pass of the model: (the clean latents it predicted, the latents it was given).
Told = Callable[[Tensor, Tensor], None]

# Equations


def ddim_step(x: Tensor, clean: Tensor, sigma: float, following: float) -> Tensor:
    """A DDIM step without noise from `sigma` above 0 to `following`, with the prediction `clean` at `sigma`."""
    return x + (x - clean) / sigma * (following - sigma)


def inverted_step(below: Tensor, clean: Tensor, at: Tensor, sigma: float, following: float) -> Tensor:
    """A DDIM step backwards: the latents at `following` from which a step with the prediction `clean`, made of `at`,
    leads to `below` at `sigma`. Exact when `at` is the result."""
    return below + (at - clean) / following * (following - sigma)


def inverted(
    predict: Predict, clean: Tensor, sigmas: Tensor, rounds: int, told: Told, process: Process = DIFFUSION
) -> Tensor:
    """The path of `clean` (rows, channels, h, w) at `sigmas`, falling to 0: (n, rows, channels, h, w). `process` is the
    model's.

    Each step is a fixed point: the latents above are asked for the step that leads to those below. `rounds` more turns
    come nearer to it than plain inversion (0); a row whose turns lead away goes back to the nearest and stays."""
    states = [clean]
    for sigma, following in pairwise(reversed(sigmas.tolist())):
        below = states[-1]
        at, nearest = process.first_guess(below, sigma, following), below
        miss = torch.full((len(below), *[1] * (below.ndim - 1)), math.inf, device=below.device)
        nearing = torch.ones_like(miss, dtype=torch.bool)
        for turn in range(rounds + 1):
            prediction = predict(at, following)
            told(prediction, at)
            result = inverted_step(below, prediction, at, sigma, following)
            if turn > 0:
                # By how much the step from `at` misses `below`; the guess is no candidate.
                missed = (result - at).square().flatten(1).mean(1).view_as(miss)
                nearing = nearing & ~(missed >= miss)
                nearest, miss = torch.where(nearing, at, nearest), torch.where(nearing, missed, miss)
            at = torch.where(nearing, result, nearest)
            if not bool(nearing.any()):
                break
        states.append(at)
    return torch.stack(states[::-1])


def replayed(predict: Predict, start: Tensor, sigmas: Tensor, told: Told) -> Tensor:
    """DDIM from `start` down `sigmas`, with nothing kept to hold on to: (n, rows, channels, h, w)."""
    states = [start]
    for sigma, following in pairwise(sigmas.tolist()):
        prediction = predict(states[-1], sigma)
        told(prediction, states[-1])
        states.append(ddim_step(states[-1], prediction, sigma, following))
    return torch.stack(states)


# The link's value


@dataclass(frozen=True, eq=False)
class Inversion:
    """A picture's kept path: `sigmas` (n) falling to 0, `states` (n, rows, channels, h, w) of float32 in the model's
    latent space (with a frame before the height where the model has frames), the family of the model, and the features
    it has lent so far. Of a reference only what lies inside `mask` (1 or rows, height, width; 0 to 1, any size) lends.
    The value on a TRAJECTORY link."""

    sigmas: Tensor
    states: Tensor
    family: str
    cache: FeatureCache = field(default_factory=lambda: FeatureCache(CACHE_MEGABYTES * MEGABYTE))
    mask: Tensor | None = None

    @property
    def stream(self) -> Trajectory:
        """The path as a companion stream, with the generation's own conditioning."""
        return Trajectory(self.sigmas, self.states, None, self.cache, ("trajectory",))


def drift_report(inversion: Inversion, replay: Tensor | None) -> str:
    """What a replay drifts, as a table of sigmas; without a replay, that the kept path is exact."""
    stream = inversion.stream
    levels = inversion.sigmas.tolist()
    given = [stream.latents(level, lambda *_: torch.empty(0)) for level in levels]
    wrong = max(float((one - kept).abs().max()) for one, kept in zip(given, inversion.states, strict=True))
    lines = [
        f"{len(levels)} latents kept, sigma {levels[0]:.4g} to {levels[-1]:.4g}",
        f"error with the kept latents: {wrong:g} at every sigma",
    ]
    if replay is None:
        return "\n".join(lines)
    lines += [f"error when replayed from sigma {levels[0]:.4g} without them, root mean square:", "sigma  error"]
    errors = (replay.cpu() - inversion.states).square().flatten(1).mean(1).sqrt().tolist()
    lines += [f"{level:.4g}  {error:.4g}" for level, error in zip(levels, errors, strict=True)]
    spread = float(inversion.states[-1].std())
    lines.append(f"at the picture that is {errors[-1] / max(spread, 1e-12):.1%} of its latents' spread")
    return "\n".join(lines)


def to_file(inversion: Inversion) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a trajectory's safetensors file."""
    tensors = {"sigmas": inversion.sigmas.contiguous(), "states": inversion.states.contiguous()}
    if inversion.mask is not None:
        tensors["mask"] = inversion.mask.contiguous()
    return tensors, {"format": FORMAT, "family": inversion.family}


def from_file(tensors: dict[str, Tensor], metadata: dict[str, Any] | None, name: str, megabytes: int) -> Inversion:
    """The trajectory of a safetensors file. Raises ValueError for any other file, with its name."""
    if (metadata or {}).get("format") != FORMAT or not {"sigmas", "states"} <= tensors.keys():
        raise ValueError(f"The file {name} is no trajectory; choose one that Save Inversion Trajectory wrote.")
    sigmas, states = tensors["sigmas"].float(), tensors["states"].float()
    check_path(sigmas, states, f"The trajectory file {name}")
    if not metadata.get("family"):
        raise ValueError(f"The trajectory file {name} does not say its model's family; invert the picture again.")
    mask = tensors.get("mask")
    if mask is not None and (mask.ndim != 3 or len(mask) not in (1, states.shape[1])):
        raise ValueError(
            f"The trajectory file {name} has masks of shape {tuple(mask.shape)} for {states.shape[1]} pictures; invert "
            "the picture again."
        )
    mask = None if mask is None else mask.float()
    return Inversion(sigmas, states, metadata["family"], FeatureCache(megabytes * MEGABYTE), mask)


def read_trajectory(path: str, name: str, megabytes: int) -> Inversion:
    """The trajectory of a file. Raises ValueError, with its `name`, when there is none or it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {name} any more; choose another, or save the trajectory again.") from error
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The file {name} cannot be read ({error}): it is no safetensors file, or cut off; choose another, or save "
            "the trajectory again."
        ) from error
    return from_file(tensors, metadata, name, megabytes)


def check_path(sigmas: Tensor, states: Tensor, what: str) -> None:
    """Raises ValueError when sigmas and states are no path."""
    shaped = sigmas.ndim == 1 and states.ndim in (5, 6) and 0 not in states.shape
    if not shaped or len(sigmas) != len(states) or len(sigmas) < 2:
        raise ValueError(
            f"{what} has {sigmas.numel()} sigmas for states of shape {tuple(states.shape)}; invert the picture again."
        )
    finite = bool(sigmas.isfinite().all()) and bool(states.isfinite().all())
    if not bool((sigmas.diff() < 0).all()) or not finite:
        raise ValueError(
            f"{what} has sigmas that do not fall or latents that are not finite; invert the picture again."
        )
