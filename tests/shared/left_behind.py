"""What a run could have left behind, and how runs end before their time."""

from __future__ import annotations

import gc
from typing import Any

import comfy.model_management
from subject_patches.patches.engine.recording import Recording
from subject_patches.patches.engine.session import Forward, Session
from subject_patches.patches.mechanisms.region import Regions


def tree(value: Any) -> Any:
    """A value by what it is made of: what lists, dictionaries and small classes hold, and who the rest is."""
    if isinstance(value, dict):
        return {str(name): tree(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tree(item) for item in value]
    return tree(vars(value)) if isinstance(value, Regions) else (type(value), id(value))


def state_of(model: Any) -> tuple[Any, ...]:
    """Everything a node could have left on a MODEL: its options, its patches, its modules' attributes."""
    parts = (model.model_options, model.wrappers, model.callbacks, model.patches, model.object_patches)
    modules = {name: sorted(vars(module)) for name, module in model.model.named_modules()}
    return *(tree(part) for part in parts), str(model.patches_uuid), modules


def left_of_sessions() -> list[Any]:
    """What of a run is still alive."""
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in (Session, Recording, Forward)]


def interrupt(step: int, *_: Any) -> None:
    """A sampler's callback that presses cancel after the second step."""
    if step == 1:
        comfy.model_management.interrupt_current_processing()
