"""Hooks of a conditioning, a LoRA that acts with it alone, in companions' passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.hooks import HookGroup, HookKeyframe, HookKeyframeGroup
from torch import Tensor


def loaded_of(hooks: HookGroup, model_options: Mapping[str, Any], model: Any) -> HookGroup:
    """Those of a given conditioning's hooks that the host has loaded: it loads what the run's own prompts have. It
    prepares the keyframes of these only, so that a copy of the others begins anew here."""
    loaded = hooks.new_with_common_hooks(model_options.get("registered_hooks") or HookGroup())
    for hook in loaded.hooks:
        hook.hook_keyframe = hook.hook_keyframe.clone()
        hook.initialize_timesteps(model)
    return loaded


class HeldHooks:
    """Copies of hooks for the passes of one run that are at another noise level than the sampler's. The host's
    keyframes follow the levels that it is told and never go back: a nearly clean pass would take the picture's own to
    their end.

    There is one copy of each group for the whole run, because the host keeps the weights that it made by group."""

    def __init__(self) -> None:
        self._copies: dict[HookGroup, HookGroup] = {}

    def clear(self) -> None:
        """Lets everything go."""
        self._copies.clear()

    def held(
        self, entries: list[dict[str, Any]], patcher: Any, timestep: Tensor, model_options: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """A conditioning's entries with hooks that stay as they are at the sampler's `timestep`."""
        return [
            entry
            if entry.get("hooks") is None
            else {**entry, "hooks": self._copy(entry["hooks"], patcher, timestep, model_options)}
            for entry in entries
        ]

    def _copy(self, hooks: HookGroup, patcher: Any, timestep: Tensor, model_options: Mapping[str, Any]) -> HookGroup:
        if all(len(hook.hook_keyframe.keyframes) < 2 for hook in hooks.hooks):
            # Nothing is scheduled, so that the weights of the group itself serve.
            return hooks
        patcher.prepare_hook_patches_current_keyframe(timestep, hooks, model_options)
        copy = self._copies.setdefault(hooks, hooks.clone())
        for held, hook in zip(copy.hooks, hooks.hooks, strict=True):
            held.hook_keyframe = HookKeyframeGroup()
            held.hook_keyframe.add(HookKeyframe(hook.strength))
        return copy
