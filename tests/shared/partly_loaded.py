"""Models of the host's that are loaded in part, as on a card without room for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import pytest
from comfy.model_management import LoadedModel

from .models import randn

# Bytes: no layer is as small.
_ROOM = 0.1


def _partly(self: LoadedModel, extra_memory: float, force_patch_weights: bool = False) -> Any:
    return self.model.partially_load(self.device, _ROOM, force_patch_weights=force_patch_weights)


@contextmanager
def no_room() -> Iterator[None]:
    """Meanwhile the host loads no layer of a model to its device: each is brought there when it is called. A CPU has
    always room, so the host does not do that by itself here."""
    comfy.model_management.unload_all_models()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedModel, "model_use_more_vram", _partly)
        yield
    comfy.model_management.unload_all_models()


def with_lora_on_keys(model: Any) -> Any:
    """A clone with a patch of every weight that makes keys, which the host adds to a layer that is not loaded when it
    is called."""
    weights = model.model.state_dict()
    keys = {name: each for name, each in weights.items() if name.endswith(("to_k.weight", "qkv.weight"))}
    clone = model.clone()
    changed = clone.add_patches({name: ("diff", (0.1 * randn(*each.shape, seed=60),)) for name, each in keys.items()})
    assert set(changed) == set(keys) != set()
    return clone
