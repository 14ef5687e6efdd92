"""The host's slots for attention patches: what edits and recordings put there for one forward of the model.

A slot holds one patch and its last writer wins, so these are composed when the model runs, around whatever another pack
has put there by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention, optimized_attention_masked
from torch import Tensor

from ..parts.sites import Site
from .attention import OVERRIDE
from .call import BATCH, AttentionCall, prompt_keys
from .chunk import Chunk
from .execution import Attend, execute
from .recording import Recording
from .session import Forward, Session
from .widening import Widening

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


def _heeding_attention(session: Session, extra: dict[str, Any]) -> Attend:
    """The same for what edits amended, where an override that leaves masks away would lose it."""
    if OVERRIDE not in extra:
        return _host_attention(extra)
    bare = {name: value for name, value in extra.items() if name != OVERRIDE}
    return session.heeding.attend(_host_attention(extra), _host_attention(bare), extra["n_heads"])


def plain(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any], other: Any) -> Tensor:
    """A patch that computes a layer's attention as it is."""
    return _host_attention(extra)(query, key, value, None) if other is None else other(query, key, value, extra)


def _grid(query: Tensor, extra: dict[str, Any], size: tuple[int, int]) -> tuple[int, int] | None:
    """The (height, width) of a layer's queries, told by the host, or where that is missing found for latents of a
    size."""
    told = extra.get("activations_shape")
    grids = [tuple(told[-2:])] if told else [tuple(-(-side // 2**n) for side in size) for n in range(6)]
    return next(((height, width) for height, width in grids if height * width == query.shape[1]), None)


def _chunks(
    forward: Forward, widening: Widening, site: Site, query: Tensor, extra: dict[str, Any]
) -> Sequence[Chunk] | None:
    """What the rows of a layer are; None where that cannot be told."""
    chunks, rows = widening.parts(forward.chunks), len(query)
    if chunks and chunks[-1].rows.stop == rows:
        widening.begins[site] = query[:, 0].clone()
        return chunks
    # Another pack's transformer block may ask again for some of the chunks, or of the rows.
    uuids = extra.get("uuids") or ()
    again, start = [], 0
    for uuid in uuids if len(uuids) < len(forward.chunks) else ():
        chunk = next((each for each in forward.chunks if each.conditioning.get("uuid") == uuid), None)
        if chunk is not None:
            stop = start + chunk.rows.stop - chunk.rows.start
            again.append(replace(chunk, rows=slice(start, stop)))
            start = stop
    return again if again and start == rows else widening.again(site, query, forward.chunks)


def recorder(session: Session, recording: Recording, site: Site, attention: Patch = plain) -> Patch:
    """A patch that computes a layer, as it is or with an editor's patch, and keeps its features for a stream."""

    def record(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any], other: Any) -> Tensor:
        extra = {**extra, "n_heads": extra.get("n_heads") or session.heads(site)}
        output = attention(query, key, value, extra, other)
        grid = _grid(query, extra, tuple(recording.stream.shape[-2:]))
        features = {"query": query, "key": key, "value": value, "output": output}
        # All that cross-attention attends to is the prompt.
        features |= {"prompt_key": key, "prompt_output": output}
        told = extra.get("activations_shape")
        recording.record(site, tuple(told[-2:]) if told else grid, features)
        return output

    return record


def watched(patches: Mapping[str, Any], widenings: Mapping[str, Widening]) -> dict[str, Any]:
    """The host's lists of patches with ours around what other packs change of an attention's input, where some do."""
    around = {}
    for kind, widening in widenings.items():
        name = f"{SLOT_OF_KIND[kind]}_patch"
        if patches.get(name):
            around[name] = [widening.first, *patches[name], widening.last]
    return {**patches, **around}


def editor(session: Session, forward: Forward, site: Site, widening: Widening) -> Patch:
    """A patch that lets the session's edits amend a layer's attention, chunk by chunk, and runs what came of it. Around
    another pack's patch, that is added to the patch's output as the difference from the plain attention."""

    def edit(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any], other: Any) -> Tensor:
        extra = {**extra, "n_heads": extra.get("n_heads") or session.heads(site)}
        chunks = _chunks(forward, widening, site, query, extra)
        if chunks is None:
            if site not in widening.begins:
                session.leave(site, forward, BATCH)
            return plain(query, key, value, extra, other)
        if len(key) != len(query):
            # So does the host's attention where only queries were cut into tiles.
            key, value = (each.reshape(len(query), -1, each.shape[-1]) for each in (key, value))
        calls = []
        for chunk in chunks:
            rows, places = chunk.rows, _grid(query, extra, chunk.size) if chunk.known_places else None
            call = AttentionCall(
                query[rows], key[rows], value[rows], extra["n_heads"], site, chunk, places,
                prompt=prompt_keys(site, key[rows], chunk), project=partial(session.project, site),
            )  # fmt: skip
            session.amend(call)
            calls.append(call)
        amended = [call for call in calls if call.amended]
        if not amended:
            return plain(query, key, value, extra, other)
        attend = _heeding_attention(session, extra)
        if other is None:
            return torch.cat(execute(calls, attend))
        output = other(query, key, value, extra).clone()
        for call, result in zip(amended, execute(amended, attend), strict=True):
            rows = call.chunk.rows
            output[rows] += result - attend(query[rows], key[rows], value[rows], None)
        return output

    return edit
