"""Where the picture of a companion stands, in models that count its places from the end of the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..families import Transformer
from ..parts.cache import Features
from .call import AttentionCall

# What is turned by places.
_TURNED = ("query", "key")


def standing_as(
    call: AttentionCall, features: Features, theirs: Mapping[str, Any], family: Transformer, network: Any
) -> Features:
    """A stream's features in a joint attention as if its picture stood where that of a call does: its prompt, `theirs`
    as the model gets it, may have another length. With pictures of the host's own between prompt and picture they are
    left as they are."""
    conds = (call.chunk.conditioning["model_conds"], theirs["model_conds"])
    if any("ref_latents" in each or "c_crossattn" not in each for each in conds):
        return features
    own, other = (family.stands_at(each["c_crossattn"].cond.shape[1]) for each in conds)
    rope = family.rope(network) if own != other else None
    if rope is None:
        return features
    shift = [own - other, *[0] * (len(rope.rates) - 1)]

    def turned(part: str) -> Any:
        flat = features[part].flatten(0, -2)[None]
        return rope.rotated(flat, call.heads, shift).view_as(features[part])

    return {**features, **{part: turned(part) for part in _TURNED if part in features}}
