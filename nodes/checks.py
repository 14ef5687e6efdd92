"""Checks of what comes in by the queue: a page keeps its numbers and choices in bounds, an API client may not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def check_number(name: str, value: float, least: float, most: float) -> None:
    """Raises ValueError unless the value is a number from `least` to `most`."""
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(f"The {name} is {value}; give a number from {least:g} to {most:g}.")


def check_choice(name: str, value: str, options: Sequence[str]) -> None:
    """Raises ValueError unless the value is one of the options."""
    if value not in options:
        raise ValueError(f"The {name} is '{value}'; choose one of {', '.join(options)}.")


def check_loaded(clip: Any = "", vae: Any = "") -> None:
    """Raises ValueError for a CLIP or VAE that is None, as the host's loader gives it of a checkpoint without one."""
    if clip is None:
        raise ValueError(
            "The clip input is None, so the checkpoint has no text encoder; load one with a CLIP loader node."
        )
    if vae is None:
        raise ValueError("The vae input is None, so the checkpoint has no VAE; load one with Load VAE.")
