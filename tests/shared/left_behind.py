"""What a run could have left behind, and how runs end before their time."""

from __future__ import annotations

import gc
from typing import Any

import comfy.model_management
from subject_patches.patches.engine.recording import Recording
from subject_patches.patches.engine.session import Forward, Session


def state_of(model: Any) -> tuple[Any, ...]:
    """Everything a node could have left on a MODEL: its options, its patches, its modules' attributes."""

    def tree(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): tree(item) for name, item in value.items()}
        return [tree(item) for item in value] if isinstance(value, (list, tuple)) else (type(value), id(value))

    parts = (model.model_options, model.wrappers, model.callbacks, model.patches, model.object_patches)
    modules = {name: sorted(vars(module)) for name, module in model.model.named_modules()}
    return *(tree(part) for part in parts), str(model.patches_uuid), modules


def left_of_sessions() -> list[Any]:
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in (Session, Recording, Forward)]


def interrupt(step: int, *_: Any) -> None:
    if step == 1:
        comfy.model_management.interrupt_current_processing()
