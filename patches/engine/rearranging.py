"""What other packs' patches made of a joint attention's rows and tokens, before it is called, and of a prompt's tokens
behind the model's inputs.

The host lets them change queries and keys and does not tell what became of them: a couple repeats rows, once for each
of its regions, with another prompt each; others put tokens before the prompt or between it and the picture. A row or a
token is known again by its contents, as in a U-Net's layers (`widening.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .chunk import Chunk
from .widening import of_another_prompt, runs_of


@dataclass(frozen=True)
class Change:
    """One attention after other packs' patches: which row each row was, where its picture begins among queries and
    keys, and where among the keys each row's own prompt begins (None where it has another)."""

    origins: tuple[int, ...]
    queries: int
    keys: int
    prompts: tuple[int | None, ...]

    def chunks(self, chunks: tuple[Chunk, ...]) -> list[tuple[Chunk, int | None]]:
        """The chunks of the rows as they are now, in their order, and where the prompt of each begins."""
        parts = []
        for part in runs_of(list(self.origins), chunks):
            begins = set(self.prompts[part.rows])
            found = begins.pop() if len(begins) == 1 else None
            parts.append((part if found is not None else of_another_prompt(part), found))
        return parts


@dataclass
class Joined:
    """Two patches around those of other packs behind the inputs of one forward, where some put tokens beside the
    prompt's (the host's USO Style Reference). `begins` is where the prompt's own begin among them all; None where
    these are fewer, or more and not the prompt's before or behind others."""

    begins: int | None = 0
    _text: Tensor | None = None

    def first(self, streams: dict[str, Any]) -> dict[str, Any]:
        """The patch before all others: its text is (rows, tokens, channels)."""
        self._text = streams["txt"]
        return streams

    def last(self, streams: dict[str, Any]) -> dict[str, Any]:
        """The patch behind all others."""
        given, text, self._text = self._text, streams["txt"], None
        count, more = given.shape[1], text.shape[1] - given.shape[1]
        places = (0, more) if more > 0 else ()
        found = (place for place in places if torch.equal(text[:, place : place + count], given))
        self.begins = 0 if more == 0 else next(found, None)
        return streams


@dataclass
class Rearranging:
    """Two patches around those of other packs, of one forward whose pictures have `count` tokens and whose context has
    `context`, which others may have `joined`. `begins` is where the host says that the picture begins; `change` is None
    where nothing was moved, and `lost` where something was that cannot be told."""

    count: int
    context: int
    joined: Joined = field(default_factory=Joined)
    begins: int | None = None
    change: Change | None = None
    lost: bool = False
    # What the layer was given; its queries once more with marks, where rows begin alike.
    _query: Tensor | None = None
    _key: Tensor | None = None
    _marked: Tensor | None = None

    def first(self, query: Tensor, key: Tensor, *_: Any, extra_options: Mapping[str, Any], **__: Any) -> dict[str, Any]:
        """The patch before all others: tensors are (rows, heads, tokens, width). Pictures that begin alike, as those of
        cond and uncond before the first prompt is read, are marked; `last` takes the marks away."""
        begins = extra_options["img_slice"][0]
        starts = query[:, 0, begins]
        alike = (starts[:, None] == starts[None]).all(-1).int().argmax(1)
        marks = alike != torch.arange(len(query), device=query.device)
        self._query, self._key, self._marked = query, key, query
        if not bool(marks.any()):
            return {}
        self._marked = query.clone()
        self._marked[marks, 0, begins, 0] += torch.arange(1, len(query) + 1, device=query.device)[marks].to(query)
        return {"q": self._marked}

    def last(self, query: Tensor, key: Tensor, *_: Any, extra_options: Mapping[str, Any], **__: Any) -> dict[str, Any]:
        """The patch behind all others."""
        self.begins, self.change, self.lost = extra_options["img_slice"][0], None, False
        if self._query is None:
            return {}
        place, origins = self.begins, tuple(range(len(query)))
        if query.shape != self._query.shape or key.shape != self._key.shape:
            self.change = self._changed(query, key)
            self.lost = self.change is None
            if self.change is not None:
                place, origins = self.change.queries, self.change.origins
        given, marked = self._query, self._marked
        self._query = self._key = self._marked = None
        if marked is given or self.lost:
            return {}
        if query is marked:
            return {"q": given}
        query = query.clone()
        query[:, 0, place, 0] = given[list(origins), 0, self.begins, 0].to(query)
        return {"q": query}

    def _changed(self, query: Tensor, key: Tensor) -> Change | None:
        for queries in _places(self.begins, query, self._marked, self.count):
            # One head's first token: a pack may have changed others.
            same = (query[:, 0, queries][:, None] == self._marked[:, 0, self.begins]).all(-1)
            if bool((same.sum(1) == 1).all()):
                origins = same.int().argmax(1).tolist()
                break
        else:
            return None
        before = self._key[origins]
        ends = before[:, :, [self.begins, self.begins + self.count - 1]]
        for keys in _places(self.begins, key, before, self.count):
            if torch.equal(key[:, :, [keys, keys + self.count - 1]], ends):
                break
        else:
            return None
        prompts: list[int | None] = [None] * len(origins)
        own = self.joined.begins
        texts = {0, max(key.shape[2] - before.shape[2], 0), max(keys - self.begins, 0)} if own is not None else ()
        for start in (text + own for text in texts):
            if start + self.context <= keys:
                same = key[:, :, start : start + self.context] == before[:, :, own : own + self.context]
                prompts = [
                    start if known else other for known, other in zip(same.flatten(1).all(1), prompts, strict=True)
                ]
        return Change(tuple(origins), queries, keys, tuple(prompts))


def _places(start: int, now: Tensor, before: Tensor, count: int) -> list[int]:
    """Where in tokens (rows, heads, n, width) `count` ones may begin that began at `start`."""
    places = dict.fromkeys((start, start + now.shape[2] - before.shape[2]))
    return [place for place in places if 0 <= place <= now.shape[2] - count]
