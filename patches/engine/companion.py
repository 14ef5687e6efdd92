"""With what of a run's options a companion's pass runs: what belongs to the model, not what belongs to the picture.

A companion's pass is one more call of the model, on other latents, with its own prompt, often of a single row. Other
packs' patches were made for the picture's calls.

What belongs to the model acts on a companion too, because it is part of how the model computes: its weights and their
patches (LoRA, quantisation), its objects, the attention function that the host lets packs override, and patches of
layers that treat each row by itself (token merging, FreeU, a hypernetwork).

What belongs to the picture does not: whatever wraps a call of the model (step caches, tiling, context windows,
compiling), whatever replaces a layer's attention, patches that change what a row is, how many there are or how many
keys it has (couples, regions, sharing inside the batch), and what stands where the picture is controlled: behind the
model's inputs or behind a whole block (control, styles, tokens beside the picture). No pack is known by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from types import MethodType
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

# Openings through which other packs wrap a call of the model.
_WRAPPING = frozenset({"model_function_wrapper", "context_handler"})
# What the host tells of the picture's own call.
_OF_A_CALL = frozenset({"context_window"})
# Where patches of ours are made, in any room.
_OURS = __package__.rpartition(".")[0]
_OF_ATTENTION = frozenset({"attn1_patch", "attn2_patch", "attn1_output_patch", "attn2_output_patch"})
# Behind the model's inputs and behind whole blocks: what control, styles and pictures beside the own are put in by.
_CONTROLLING = frozenset({"post_input", "double_block", "noise_refiner", "middle_block_after_patch"})
_ACTING = frozenset({"patches", "optimized_attention_override"})
# Some places list a patch behind the class of the layers that it is for.
Patch = Callable[..., Any] | tuple[type, Callable[..., Any]]


class OfThePictureError(Exception):
    """A patch turned out, in a companion's pass, to belong to the picture; `owner` is what it is a part of."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


def companion_options(model_options: Mapping[str, Any], own_key: str) -> dict[str, Any]:
    """The run's options without what wraps a call of the model, for the host's `calc_cond_batch`."""
    options = model_options["transformer_options"]
    wrappers = {
        kind: {key: listed for key, listed in keyed.items() if str(key).startswith(own_key)}
        for kind, keyed in options.get("wrappers", {}).items()
    }
    kept = {name: value for name, value in options.items() if name not in _OF_A_CALL}
    rest = {name: value for name, value in model_options.items() if name not in _WRAPPING}
    return {**rest, "transformer_options": _without_replacements({**kept, "wrappers": wrappers})}


def acting_on_companions(options: Mapping[str, Any], of_the_node: Mapping[str, Any]) -> dict[str, Any]:
    """What of a companion's options decides its features: patches and the attention function as the run has them, and
    what else a node put there as the node did, because many put a copy in its place for each run. What only the run
    has, its state, does not count."""
    here, made = options["transformer_options"], of_the_node.get("transformer_options", {})
    acting = {name: here[name] for name in _ACTING if name in here}
    parameters = {name: value for name, value in made.items() if name in here and name not in _ACTING | {"wrappers"}}
    return {**parameters, **acting}


def _without_replacements(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "patches_replace"}


def companion_call(options: Mapping[str, Any], left_out: Set[str]) -> dict[str, Any]:
    """The options of one call of the model for a companion: no replacements, which a conditioning's hooks may have
    brought in again, and of the layers' patches those of no owner that controls the picture or is in `left_out`, each
    under watch: one that does not fit raises `OfThePictureError`."""
    patches, given = {}, options.get("patches", {})
    left_out = left_out | {owner_of(each) for place in _CONTROLLING for each in given.get(place, ())} - {_OURS}
    for place, listed in given.items():
        kept = [each for each in listed if owner_of(each) not in left_out]
        patches[place] = [each if owner_of(each) == _OURS else _watched(place, each) for each in kept]
    return {**_without_replacements(options), "patches": patches}


def owner_of(patch: Any) -> str:
    """What a patch is a part of: patches of one module go together, as a couple's on a layer's input and its output."""
    if isinstance(patch, tuple):
        patch = patch[-1]
    while isinstance(patch, partial):
        patch = patch.func
    if isinstance(patch, MethodType):
        patch = type(patch.__self__)
    module = getattr(patch, "__module__", None) or type(patch).__module__
    return _OURS if module.startswith(f"{_OURS}.") else module


def _watched(place: str, patch: Patch) -> Patch:
    if isinstance(patch, tuple):
        return (*patch[:-1], _watched(place, patch[-1]))

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            result = patch(*args, **kwargs)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            if comfy.model_management.is_oom(error) or "out of memory" in str(error).lower():
                raise
            raise OfThePictureError(owner_of(patch)) from error
        if not _fits(place, list(_tensors(args)), list(_tensors(result))):
            raise OfThePictureError(owner_of(patch))
        return result

    return call


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of what a patch was given or gave, but for those in its options."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from (each,) if isinstance(each, Tensor) else ()
    elif isinstance(value, dict):
        yield from (each for each in value.values() if isinstance(each, Tensor))


def _fits(place: str, given: list[Tensor], result: list[Tensor]) -> bool:
    """Whether a patch left rows what they are. An attention's queries may be merged or cut into tiles, if its keys stay
    as they are; elsewhere there must be as many rows as before."""
    if not given or not result:
        return True
    rows = given[0].shape[0]
    if place not in _OF_ATTENTION:
        return all(each.shape[:1] == given[0].shape[:1] for each in result)
    first, *others = result
    as_before = first.shape[0] == rows or first.shape[:2].numel() == given[0].shape[:2].numel()
    if place == "attn1_patch":
        return as_before and all(a.shape[:-1] == b.shape[:-1] for a, b in zip(given[1:], others, strict=False))
    lengths = {each.shape[1] for each in others if each.ndim > 1}
    return as_before and all(each.shape[0] == rows for each in others) and len(lengths) <= 1


def silenced(output: Tensor, extra: dict[str, Any]) -> Tensor:
    """A patch of an attention's output that leaves nothing of what the layer would add."""
    return torch.zeros_like(output)
