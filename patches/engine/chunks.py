"""What a call of the model is made of: which rows of its batch are of which conditioning and part of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..families import Family
from .chunk import Chunk
from .placing import Run, area_of, runs_of, spots_of

UNCONDITIONED = frozenset({"negative", "empty_negative_prompt"})


def chunks_of(
    conds: Mapping[str, Any], family: Family, whole: Tensor, uuids: Sequence[Any], x: Tensor, context: Tensor | None
) -> list[Chunk]:
    """The chunks of a call on latents `x` with a `context`, in the order of their rows, in a run whose sampler gave the
    latents `whole` and whose guider has the lists `conds`. `uuids` are the host's, one for each chunk that it made.

    The host calls the model on the whole picture, or on the areas of its conditionings, one chunk after the other. What
    is neither is looked for in the picture: a tile, a window, some rows of a batch."""
    latent = (whole.shape[-2], whole.shape[-1])
    size = len(x) // len(uuids)
    usual = [] if len(x) % len(uuids) else [
        _chunk(conds, family, latent, uuid, slice(n * size, (n + 1) * size), context) for n, uuid in enumerate(uuids)
    ]  # fmt: skip
    shaped = bool(usual) and len(whole) == size and all(tuple(x.shape[-2:]) == tuple(each.size) for each in usual)
    if shaped and all(torch.equal(each.cut(whole), x[each.rows]) for each in usual):
        return usual
    spots = spots_of(x, whole)
    runs = None if spots is None else runs_of(spots, len(uuids)) or _by_prompt(conds, spots, uuids, context)
    if runs is None:
        # Other latents of the picture's shape, as guidance of other packs makes them, are taken for the picture.
        return usual if shaped else [replace(each, known_places=False) for each in usual]
    chunks = []
    for run in runs:
        chunk = _chunk(conds, family, latent, uuids[run.prompt], run.rows, context)
        area = area_of(run.lines)
        where = None if area == (*latent, 0, 0) else area
        lines = run.lines if area is None else None
        chunks.append(replace(chunk, area=where, lines=lines, pictures=run.pictures, count=len(whole)))
    return chunks


def _chunk(
    conds: Mapping[str, Any], family: Family, latent: tuple[int, int], uuid: Any, rows: slice, context: Tensor | None
) -> Chunk:
    here = None if context is None else context[rows]
    found = [(name, entry) for name, listed in conds.items() for entry in listed or () if entry.get("uuid") == uuid]
    if len({name for name, _ in found}) > 1:
        # With area conditioning the host copies an entry, uuid and all, into the other list, with that list's own
        # prompt: the prompt tells them apart.
        found = [(name, entry) for name, entry in found if _is_prompt_of(entry, here)]
    if not found:
        return Chunk(rows, "", False, {}, latent)
    name, entry = found[0]
    area = entry.get("area")
    if area is not None:
        height, width, y, x = area[-4:] if len(area) == 4 else (*area[1:3], *area[-2:])
        area = (min(height, latent[0] - y), min(width, latent[1] - x), y, x)
    before, again = family.before(entry), family.again(entry)
    return Chunk(rows, name, name not in UNCONDITIONED, entry, latent, area, before=before, again=again)


def _by_prompt(
    conds: Mapping[str, Any], spots: Sequence[Any], uuids: Sequence[Any], context: Tensor | None
) -> list[Run] | None:
    """Runs of a batch that another pack made of some of the prompts only, told apart by what they say."""
    runs = []
    for row, spot in enumerate(spots):
        here = None if context is None else context[row : row + 1]
        mine = [
            number for number, uuid in enumerate(uuids) for listed in conds.values() for entry in listed or ()
            if entry.get("uuid") == uuid and _is_prompt_of(entry, here)
        ]  # fmt: skip
        if len(set(mine)) != 1:
            return None
        runs.append(Run(slice(row, row + 1), mine[0], (spot.picture,), spot.lines))
    return runs


def _is_prompt_of(entry: Mapping[str, Any], context: Tensor | None) -> bool:
    own = entry["model_conds"].get("c_crossattn")
    if own is None or context is None:
        return False
    length = own.cond.shape[1]
    return bool(torch.equal(own.cond[:1].to(context), context[:1, :length]))
