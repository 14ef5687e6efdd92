"""Checks of what comes in.

By the queue come numbers and choices, which a page keeps in bounds and an API client may not. By links come pictures,
masks, latents and prompts that another pack may have made in its own way: what can be read in one way only is brought
into the host's form, and the rest ends in a sentence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..patches.families import context_width

# How far beyond 0 to 1 a picture or mask may be: resizing and sharpening overshoot, another scale goes further.
OVERSHOOT = 0.5
# A mask that leaves hardly anything out, or that is white around its edge and not inside, is often upside down.
NEARLY_ALL = 0.95

# What a cache of features may be told to hold.
MEGABYTES_MAX = 65536


def check_number(name: str, value: float, least: float, most: float) -> None:
    """Raises ValueError unless the value of the input `name` is a number from `least` to `most`."""
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"The {name} {_is(name)} {value}; give a number from {least:g} to {most:g}.")


def check_choice(name: str, value: str, options: Sequence[str]) -> None:
    """Raises ValueError unless the value of the input `name` is one of the options."""
    if value not in options:
        raise ValueError(f"The {name} {_is(name)} '{value}'; choose one of {', '.join(options)}.")


def check_each(what: str, found: int, count: int, whose: str = "pictures") -> None:
    """Raises ValueError unless there is one of `what` for all of the `count` things in `whose`, or one for each."""
    if found not in (1, count):
        raise ValueError(f"There are {found} {what} for {count} {whose}; give one for all, or one for each.")


def check_loaded(clip: Any = "", vae: Any = "") -> None:
    """Raises ValueError for a CLIP or VAE that is None, as the host's loader gives it of a checkpoint without one."""
    if clip is None:
        raise ValueError(
            "The clip input is None, so the checkpoint has no text encoder; load one with a CLIP loader node."
        )
    if vae is None:
        raise ValueError("The vae input is None, so the checkpoint has no VAE; load one with Load VAE.")


def tell(message: str) -> None:
    """Says something on the node that runs, as progress texts are said, and in the log."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    logging.warning(message)
    server, running = getattr(PromptServer, "instance", None), get_executing_context()
    if server is not None and running is not None:
        server.send_progress_text(message, running.node_id)


# Links


def pictures_in(name: str, image: Any) -> torch.Tensor:
    """The pictures (n, height, width, 3 or 4) of 0 to 1 on an IMAGE link; grey ones become colours, of two channels the
    second is the opacity.

    Raises ValueError, calling them `name`, for anything else than one to four channels, for none or without area, for
    values that are not finite, and for values of another scale than 0 to 1."""
    _check_tensor(name, image, "pictures")
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or not 1 <= image.shape[-1] <= 4:
        raise ValueError(
            f"The {name} has the shape {_shape(image)}; pictures are (number, height, width, 1 to 4 channels): give it "
            "what a node of the host's IMAGE type gives."
        )
    _check_some(name, image, image.shape[:3], "pictures")
    image = _checked_values(name, image, "picture")
    if image.shape[-1] <= 2:
        image = torch.cat([image[..., :1].expand(*image.shape[:3], 3), image[..., 1:]], -1)
    return image


def masks_in(name: str, mask: Any) -> torch.Tensor:
    """The masks (n, height, width) of 0 to 1 on a MASK link, float32.

    Raises ValueError, calling them `name`, for another number of axes, for none or without area, for values that are
    not finite, and for values of another scale than 0 to 1."""
    _check_tensor(name, mask, "masks")
    if mask.ndim == 4 and 1 in (mask.shape[1], mask.shape[-1]):
        mask = mask[:, 0] if mask.shape[1] == 1 else mask[..., 0]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3:
        raise ValueError(
            f"The {name} has the shape {_shape(mask)}; masks are (number, height, width): give it what a node of the "
            "host's MASK type gives."
        )
    _check_some(name, mask, mask.shape, "masks")
    return _checked_values(name, mask, "mask").float()


def latents_in(name: str, latent: Any, channels: int, frames: bool = False) -> torch.Tensor:
    """The latents (n, channels, height, width) on a LATENT link, or with `frames` (n, channels, 1, height, width), as a
    model of videos has them for pictures.

    Raises ValueError, calling them `name`, when they are not those of pictures with as many `channels`, when there are
    none, and for values that are not finite."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    _check_tensor(name, samples, "latents")
    if frames and samples.ndim == 4:
        samples = samples.unsqueeze(2)
    if frames and samples.ndim == 5 and samples.shape[2] > 1:
        raise ValueError(
            f"The {name} has {samples.shape[2]} frames, but only pictures can be used; give a latent of one frame."
        )
    if samples.ndim != 4 + frames or samples.shape[1] != channels:
        raise ValueError(
            f"The {name} has the shape {_shape(samples)} but this model takes {channels} channels; encode the picture "
            "with the VAE of this checkpoint."
        )
    _check_some(name, samples, samples.shape, "latents")
    _check_finite(name, samples, "latent")
    return samples


def prompt_in(name: str, conditioning: Any, model: Any = None) -> Any:
    """A CONDITIONING as it is, or None. Raises ValueError, calling it `name`, when it is empty or not finite, and when
    it is not as wide as those that `model` takes, where one is given."""
    if conditioning is None:
        return None
    if len(conditioning) == 0:
        raise ValueError(f"The {name} is an empty conditioning; connect one with tokens, or none.")
    takes = None if model is None else context_width(model)
    for context, _ in conditioning:
        if torch.is_tensor(context) and not bool(context.isfinite().all()):
            raise ValueError(
                f"The {name} has values that are no numbers (NaN or infinite); look at the node that made it."
            )
        if takes is not None and torch.is_tensor(context) and context.shape[-1] != takes:
            raise ValueError(
                f"The {name} is {context.shape[-1]} wide, but this model takes prompts {takes} wide; encode it with "
                "the CLIP that belongs to this model."
            )
    return conditioning


def sampled_prompt_in(name: str, conditioning: Any, model: Any) -> Any:
    """The same of a prompt that a sampler runs the model on: a function that wraps the model's calls is free to put
    another in its place, so its width says nothing there."""
    return prompt_in(name, conditioning, None if "model_function_wrapper" in model.model_options else model)


def single(name: str, values: Sequence[Any]) -> Any:
    """The value of an input whose node takes lists, where a list makes no sense for it; None of an optional one that is
    not connected. Raises ValueError for a list of several."""
    if not values:
        return None
    if len(values) > 1:
        raise ValueError(
            f"The {name} comes as a list of {len(values)}, but this node makes one thing of all its pictures; give one "
            f"{name}, or use a node for each."
        )
    return values[0]


def tell_upside_down(name: str, mask: torch.Tensor) -> None:
    """Says of a mask (height, width) on the node that it may be upside down."""
    if doubt := upside_down(name, mask):
        tell(doubt)


def upside_down(name: str, mask: torch.Tensor) -> str | None:
    """What to tell of a mask (height, width) that covers nearly everything, or all around but not inside; else None."""
    inside = mask > 0.5
    share = float(inside.float().mean())
    edge = torch.cat([inside[0], inside[-1], inside[:, 0], inside[:, -1]]).float().mean()
    if share < NEARLY_ALL and (float(edge) < NEARLY_ALL or share == 1):
        return None
    return (
        f"The {name} covers {share:.0%} of its picture, its edge included. If it is upside down, put Invert Mask "
        "before it."
    )


def _is(name: str) -> str:
    return "are" if name.endswith("s") and not name.endswith("ss") else "is"


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensor(name: str, value: Any, what: str) -> None:
    if not torch.is_tensor(value):
        raise ValueError(f"The {name} is a {type(value).__name__} and no {what}; connect a node that gives some.")


def _check_some(name: str, tensor: torch.Tensor, sides: Sequence[int], what: str) -> None:
    if 0 in sides:
        raise ValueError(
            f"There is nothing in the {name}: its shape is {_shape(tensor)}; connect a node that gives some {what}."
        )


def _check_finite(name: str, tensor: torch.Tensor, what: str) -> None:
    wrong = ~tensor.isfinite()
    if bool(wrong.any()):
        number = int(wrong.flatten(1).any(1).nonzero()[0]) + 1
        raise ValueError(
            f"The {name} has {int(wrong.sum())} values that are no numbers (NaN or infinite), first in {what} {number} "
            f"of {len(tensor)}; look at the node that made it."
        )


def _checked_values(name: str, tensor: torch.Tensor, what: str) -> torch.Tensor:
    # The host may give half precision, which not every operation of a CPU knows.
    tensor = tensor.float()
    _check_finite(name, tensor, what)
    least, most = float(tensor.min()), float(tensor.max())
    if least < -OVERSHOOT or most > 1 + OVERSHOOT:
        raise ValueError(
            f"The {name} goes from {least:g} to {most:g}; a {what} is 0 for black to 1 for white: bring it to that "
            "scale."
        )
    return tensor if least >= 0 and most <= 1 else tensor.clamp(0, 1)
