"""The host's slots for attention patches: what edits and recordings put there for one forward of the model.

A slot holds one patch and its last writer wins, so these are composed when the model runs, around whatever another pack
has put there by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked
from torch import Tensor

from .call import AttentionCall, prompt_keys
from .execution import Attend, execute
from .recording import Recording
from .session import Forward, Session
from .sites import Site

# (query, key, value, extra options, what another pack has in the slot or None) -> output
Patch = Callable[[Tensor, Tensor, Tensor, dict[str, Any], Any], Tensor]
SLOT_OF_KIND = {"self": "attn1", "cross": "attn2"}


def composed(present: Mapping[str, Mapping[Any, Any]], patches: Mapping[Site, Patch]) -> dict[str, dict[Any, Any]]:
    """The host's replacement slots with ours around whatever stands in them."""
    slots = {name: dict(present.get(name, {})) for name in {*present, *SLOT_OF_KIND.values()}}
    for site, patch in patches.items():
        slot = slots[SLOT_OF_KIND[site.kind]]
        # The host takes a transformer block's own replacement before the one for its whole block.
        other = slot.get(site.key, present.get(SLOT_OF_KIND[site.kind], {}).get(site.key[:2]))
        slot[site.key] = _filled(patch, other)
    return slots


def _filled(patch: Patch, other: Any) -> Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]:
    return lambda query, key, value, extra: patch(query, key, value, extra, other)


def _host_attention(extra: dict[str, Any]) -> Attend:
    """The host's own attention for a layer, with the overrides that other packs have set."""
    heads, precision = extra["n_heads"], extra.get("attn_precision")

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return optimized_attention(
                query, key, value, heads, attn_precision=precision, transformer_options=extra
            )  # fmt: skip
        return optimized_attention_masked(
            query, key, value, heads, mask, attn_precision=precision, transformer_options=extra
        )  # fmt: skip

    return attend


def plain(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any], other: Any) -> Tensor:
    """A patch that computes a layer's attention as it is."""
    return _host_attention(extra)(query, key, value, None) if other is None else other(query, key, value, extra)


def _grid(query: Tensor, extra: dict[str, Any]) -> tuple[int, int] | None:
    height, width = extra["activations_shape"][-2:]
    return (height, width) if height * width == query.shape[1] else None


def recorder(recording: Recording, site: Site, attention: Patch = plain) -> Patch:
    """A patch that computes a layer, as it is or with an editor's patch, and keeps its features for a stream."""

    def record(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any], other: Any) -> Tensor:
        output = attention(query, key, value, extra, other)
        features = {"query": query, "key": key, "value": value, "output": output}
        # All that cross-attention attends to is the prompt.
        features |= {"prompt_key": key, "prompt_output": output}
        recording.record(site, tuple(extra["activations_shape"][-2:]), features)
        return output

    return record


def editor(session: Session, forward: Forward, site: Site) -> Patch:
    """A patch that lets the session's edits amend a layer's attention, chunk by chunk, and runs what came of it. Around
    another pack's patch, that is added to the patch's output as the difference from the plain attention."""

    def edit(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any], other: Any) -> Tensor:
        if query.shape[0] != forward.rows or key.shape[0] != forward.rows:
            session.leave(site, forward)
            return plain(query, key, value, extra, other)
        grid = _grid(query, extra)
        calls = []
        for chunk in forward.chunks:
            rows, places = chunk.rows, grid if chunk.known_places else None
            call = AttentionCall(
                query[rows], key[rows], value[rows], extra["n_heads"], site, chunk, places,
                prompt=prompt_keys(site, key[rows], chunk), project=partial(session.project, site),
            )  # fmt: skip
            session.amend(call)
            calls.append(call)
        amended = [call for call in calls if call.amended]
        if not amended:
            return plain(query, key, value, extra, other)
        attend = _host_attention(extra)
        if other is None:
            return torch.cat(execute(calls, attend))
        output = other(query, key, value, extra).clone()
        for call, result in zip(amended, execute(amended, attend), strict=True):
            rows = call.chunk.rows
            output[rows] += result - attend(query[rows], key[rows], value[rows], None)
        return output

    return edit
