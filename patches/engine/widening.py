"""What other packs' patches of an attention's input made of its rows and of its prompt's tokens.

An attention couple repeats a chunk's rows once for each of its regions, with another prompt each; others leave out,
append or repeat tokens of a prompt. Nothing says so, but a row that was repeated is the same row, and a token the same
token. So two patches of ours stand around theirs: the first sees what a layer was given, the last what it became.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..parts.sites import Site
from .chunk import Chunk

# How alike two tokens are that are the same, whatever strength a couple gave to one.
_ALIKE = 0.9999


@dataclass
class Widening:
    """The layers of one kind in one forward, of which it knows the one that runs now. `origins` says which row each row
    was, None where that cannot be told; it is empty where their number did not change. `begins` are the first queries
    of the layers that were called so far."""

    origins: list[int] | None = field(default_factory=list)
    begins: dict[Site, Tensor] = field(default_factory=dict)
    _query: Tensor | None = None
    _context: Tensor | None = None
    _widened: Tensor | None = None
    # The first queries as they were marked, and whether any of them was.
    _begun: Tensor | None = None
    _marks: bool = False

    def first(self, query: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        """The patch before all others. Rows that begin alike, as those of cond and uncond before the first prompt is
        read, are marked; `last` takes the marks away."""
        self._query, self._context, self._widened, self.origins = query, context, None, []
        alike = (query[:, None, 0] == query[None, :, 0]).all(-1).int().argmax(1)
        marks = alike != torch.arange(len(query), device=query.device)
        self._marks = bool(marks.any())
        if self._marks:
            query = query.clone()
            query[marks, 0, 0] += torch.arange(1, len(query) + 1, device=query.device)[marks].to(query)
        self._begun = query[:, 0]
        return query, context, value

    def last(self, query: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        """The patch behind all others."""
        rows, before = len(query), len(self._query)
        if rows == before:
            intact = self._marks and torch.equal(query[:, 0], self._begun)
            if intact and query.shape == self._query.shape and torch.equal(query[:, 1:], self._query[:, 1:]):
                query = self._query
            elif intact:
                query = query.clone()
                query[:, 0, 0] = self._query[:, 0, 0].to(query)
        else:
            query = self._mapped(query, before)
        if rows != before or context.shape[1] != self._context.shape[1]:
            self._widened = context
        return query, context, value

    def _mapped(self, query: Tensor, before: int) -> Tensor:
        times = len(query) // before
        tiles = len(query) % before == 0 and times * query.shape[1] == self._query.shape[1]
        # Tiles of a row follow each other (HyperTile), and the first of them begins as the row does.
        asked = query[::times, 0] if tiles else query[:, 0]
        same = (asked[:, None] == self._begun[None]).all(-1)
        if not bool(same.any(1).all()):
            self.origins = None
            return query
        found = same.int().argmax(1)
        query = query.clone()
        query[:: times if tiles else 1, 0, 0] = self._query[found, 0, 0].to(query)
        self.origins = found.repeat_interleave(times).tolist() if tiles else found.tolist()
        return query

    def parts(self, chunks: tuple[Chunk, ...]) -> list[Chunk] | None:
        """The chunks of the rows as they are now, in their order; None where it cannot be told."""
        if self.origins is None:
            return None
        if not self.origins:
            return [self._told(chunk, chunk.rows.start) for chunk in chunks]
        runs = _runs(self.origins, chunks)
        parts = [self._told(_of_rows(chunk, start, numbers), start) for chunk, start, numbers in runs]
        known = {id(chunk) for (chunk, *_), part in zip(runs, parts, strict=True) if part.keys and part.keys.stop}
        # Where some of a chunk's copies read its prompt, the others read another one.
        return [
            of_another_prompt(part) if id(chunk) in known and not part.keys.stop else part
            for (chunk, *_), part in zip(runs, parts, strict=True)
        ]

    def again(self, site: Site, query: Tensor, chunks: tuple[Chunk, ...]) -> list[Chunk] | None:
        """The chunks of some of a layer's rows, which was called with all of them before in this forward."""
        if site not in self.begins or self.origins:
            return None
        same = (query[:, None, 0] == self.begins[site][None]).all(-1)
        if not bool((same.sum(1) == 1).all()):
            return None
        return Widening(same.int().argmax(1).tolist()).parts(chunks)

    def _told(self, chunk: Chunk, row: int) -> Chunk:
        """A chunk that says which of its prompt's tokens its keys are, where these changed."""
        if self._widened is None or "model_conds" not in chunk.conditioning or self._context.shape[1] % chunk.length:
            return chunk
        origin = self.origins[row] if self.origins else row
        own = self._context[origin, : chunk.length]
        return _with_tokens(chunk, own, self._widened[min(row, len(self._widened) - 1)])


def _runs(origins: list[int], chunks: tuple[Chunk, ...]) -> list[tuple[Chunk, int, list[int]]]:
    """Rows that follow each other and are rows of one chunk in its order: the chunk, the first's number, and which of
    its rows they are."""
    runs: list[tuple[Chunk, int, list[int]]] = []
    for row, origin in enumerate(origins):
        chunk = next(each for each in chunks if each.rows.start <= origin < each.rows.stop)
        number = origin - chunk.rows.start
        if runs and runs[-1][0] is chunk and number > runs[-1][2][-1]:
            runs[-1][2].append(number)
        else:
            runs.append((chunk, row, [number]))
    return runs


def runs_of(origins: list[int], chunks: tuple[Chunk, ...]) -> list[Chunk]:
    """The chunks of rows that were these rows."""
    return [_of_rows(*run) for run in _runs(origins, chunks)]


def _of_rows(chunk: Chunk, start: int, numbers: list[int]) -> Chunk:
    rows, size = slice(start, start + len(numbers)), chunk.rows.stop - chunk.rows.start
    if numbers == list(range(size)):
        return replace(chunk, rows=rows)
    pictures = chunk.pictures or tuple(range(size))
    return replace(chunk, rows=rows, pictures=tuple(pictures[n] for n in numbers), count=max(chunk.count, size))


def _with_tokens(chunk: Chunk, own: Tensor, given: Tensor) -> Chunk:
    """A chunk of the prompt `own` (length, channels) whose layer attends to `given` (keys, channels): with those keys
    that are the prompt's, none where they are not all known."""
    length = len(own)
    if not len(given) % length and _alike(given, own.repeat(len(given) // length, 1)):
        return replace(chunk, keys=slice(0, len(given)))
    for start in (0, len(given) - length):
        if start >= 0 and len(given) >= length and _alike(given[start : start + length], own):
            return replace(chunk, keys=slice(start, start + length))
    same = (given[:, None] == own[None]).all(-1)
    if bool(same.any(1).all()):
        return replace(chunk, keys=slice(0, len(given)), picked=tuple(same.int().argmax(1).tolist()))
    return replace(chunk, keys=slice(0, 0))


def of_another_prompt(chunk: Chunk) -> Chunk:
    """A chunk of which nothing that is known of its words holds."""
    return replace(chunk, conditioning={name: chunk.conditioning.get(name) for name in ("uuid", "model_conds")})


def _alike(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return True
    return bool((torch.cosine_similarity(one.float(), other.float(), dim=-1) > _ALIKE).all())
