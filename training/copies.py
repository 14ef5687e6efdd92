"""Private copies of the host's models for training: the graph's own models stay as they are."""

from __future__ import annotations

import copy
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch


@contextmanager
def with_gradients() -> Iterator[None]:
    """Leaves the inference mode in which the host runs nodes. What was made in that mode cannot take part in autograd:
    `clone` it in here first."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def private_copy(patcher: Any) -> Any:
    """A ModelPatcher with weights of its own, the patches (LoRA) of the given one, and no gradients wanted yet.

    Call it in `with_gradients`. The given model is unloaded first, which takes its patches out of its weights and
    frees the memory that the copy will need. Raises ValueError when the host keeps the model's weights in a way that
    only its own loader can copy, and another node made the model."""
    if patcher.is_dynamic():
        if patcher.cached_patcher_init is None:
            raise ValueError(
                "This model cannot be copied for training, because no loader node of the host made it; load it with "
                "Load Checkpoint, or start ComfyUI with --disable-dynamic-vram."
            )
        made = patcher.clone(disable_dynamic=True)
    else:
        comfy.model_management.unload_model_and_clones(patcher)
        # A copy of what the host notes beside the weights: they carry no patches now, so nothing.
        notes: tuple[Any, ...] = ({}, {}, {}, set())
        made = patcher.clone(model_override=(_copied(patcher.model), notes))
    # The host must not take the copy for a variant of the original, and load one in the place of the other.
    made.parent = None
    made.clone_base_uuid = uuid.uuid4()
    made.model.requires_grad_(False)
    return made


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    # Layers and weights are copied; descriptions of the model stay shared, and the host's refuse to be copied.
    shared = {id(value): value for name, value in vars(model).items() if not name.startswith("_")}
    return copy.deepcopy(model, shared)


def fingerprint(*patchers: Any) -> str:
    """Tells models apart by how each of their weights begins, and by the patches on them: of weights (LoRA), and of
    objects, such as a sampling of another kind."""
    digest = hashlib.blake2b(digest_size=8)

    def add(name: str, values: Any) -> None:
        if torch.is_tensor(values):
            begin = values.detach().flatten()[:16].float().cpu()
            values = (tuple(values.shape), begin.tolist())
        digest.update(f"{name} {values};".encode())

    for patcher in patchers:
        for name, weight in sorted(patcher.model.state_dict().items()):
            # The host puts a patched weight in the place of the model's own while it is loaded, also that of another
            # MODEL which shares the model: the own is then kept.
            if name not in patcher.patches:
                add(name, patcher.backup[name].weight if name in patcher.backup else weight)
        for name, patches in sorted(patcher.patches.items()):
            for strength, patch, *_ in patches:
                add(name, strength)
                for value in getattr(patch, "weights", patch):
                    add(name, value)
        for name, made in sorted(patcher.object_patches.items()):
            levels = [float(made.sigma_min), float(made.sigma_max)] if name == "model_sampling" else []
            add(name, ([each.__name__ for each in type(made).__mro__], levels))
    return digest.hexdigest()


def told_of(model: Any, clip: Any, vae: Any) -> dict[str, str]:
    """What tells a training's model, CLIP and VAE from others, by what a person calls it."""
    parts = [fingerprint(model, clip.patcher), *([fingerprint(vae.patcher)] if hasattr(vae, "patcher") else [])]
    layer = {} if clip.layer_idx is None else {"CLIP layer": str(clip.layer_idx)}
    return {**layer, "model, CLIP and VAE": " ".join(parts)}


@contextmanager
def loaded(*patchers: Any) -> Iterator[None]:
    """Loads private copies wholly onto their devices, and lets go of their memory in the end, however it comes."""
    try:
        comfy.model_management.load_models_gpu(list(patchers), force_full_load=True)
        yield
    finally:
        for patcher in patchers:
            comfy.model_management.unload_model_and_clones(patcher)
        comfy.model_management.soft_empty_cache()
