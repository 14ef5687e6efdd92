"""One call of the host's attention, as the override of a transformer gets it: the same in whatever shape it came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .bias import Bias

# The host's name for a function in the place of its attention.
OVERRIDE = "optimized_attention_override"
# The order of the host's positional arguments.
_NAMES = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
_SYNONYMS = {"query": "q", "key": "k", "value": "v"}
_SHAPES = ("skip_reshape", "skip_output_reshape", "enable_gqa")


@dataclass
class Attention:
    """One call of the host's attention, whatever shape its arguments came in, or of what another pack has in the slot
    (`inner`)."""

    function: Callable[..., Tensor]
    inner: Callable[..., Tensor] | None
    args: tuple[Any, ...]
    named: dict[str, Any]
    values: dict[str, Any] = field(init=False)
    _whole: dict[tuple[str, int, int], Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        named = {_SYNONYMS.get(name, name): value for name, value in self.named.items()}
        self.values = {**dict(zip(_NAMES, self.args, strict=False)), **named}

    @property
    def heads(self) -> int:
        return self.values["heads"]

    @property
    def split(self) -> bool:
        """Whether heads are a dimension of their own: (rows, heads, tokens, width)."""
        return bool(self.values.get("skip_reshape"))

    def count(self, name: str) -> int:
        """How many queries ("q") or keys ("k") there are."""
        return self.values[name].shape[2 if self.split else 1]

    def plain(self) -> Tensor:
        """What it would have been."""
        if self.inner is None:
            return self.function(*self.args, **self.named)
        return self.inner(self.function, *self.args, **self.named)

    def some(self, name: str, rows: slice = slice(None), part: slice = slice(None)) -> Tensor:
        """Some queries ("q"), keys ("k") or values ("v") of some rows: (rows, n, channels), or as they came where that
        is with heads apart: (rows, heads, n, width), as many heads of keys as of queries."""
        whole = self.values[name]
        if not self.split:
            some = whole[rows, part]
            # SD 3's values have their heads split although its queries have not.
            return some.flatten(2) if some.ndim == 4 else some
        some = whole[rows, :, part]
        return some if some.shape[1] == self.heads else some.repeat_interleave(self.heads // some.shape[1], 1)

    def tokens(self, name: str, rows: slice = slice(None), part: slice = slice(None)) -> Tensor:
        """The same with heads not split: (rows, n, channels)."""
        some = self.some(name, rows, part)
        return some.transpose(1, 2).flatten(2) if self.split else some

    def keys_and_values(self, rows: slice) -> tuple[Tensor, Tensor]:
        """All keys and values of some rows, as `some` gives them; made once, since several attentions may read
        them."""
        for name in ("k", "v"):
            if (name, rows.start, rows.stop) not in self._whole:
                self._whole[name, rows.start, rows.stop] = self.some(name, rows)
        return tuple(self._whole[name, rows.start, rows.stop] for name in ("k", "v"))

    def bias(self, rows: slice, queries: slice) -> Tensor | None:
        """The model's own mask for some rows and queries, to be added to logits: broadcastable to (rows, queries,
        keys)."""
        mask = self.values.get("mask")
        if mask is None:
            return None
        if mask.dtype == torch.bool:
            # In the queries' type, which not every kernel does without.
            none = torch.zeros(mask.shape, dtype=self.values["q"].dtype, device=mask.device)
            mask = none.masked_fill(~mask, -torch.inf)
        if mask.ndim == 4:
            mask = mask[:, 0]
        mask = mask if mask.ndim == 3 else mask[None]
        mask = mask if len(mask) == 1 else mask[rows]
        return mask if mask.shape[1] == 1 else mask[:, queries]

    def biases(self, rows: slice, queries: slice) -> tuple[Bias, ...]:
        """The same as what an `AttentionCall` has of biases."""
        mask = self.bias(rows, queries)
        return () if mask is None else (Bias(mask, 0, self.count("k")),)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The same attention on other tokens, (rows, n, channels) or with heads apart: (rows, queries, channels)."""
        given, values = self._given(query, key, value, mask)
        if self.inner is None:
            return self.function(*given, **values)
        return self.inner(self.function, *given, **values)

    def hosts(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """The same by the host's function, whatever another pack has in its place."""
        given, values = self._given(query, key, value, mask)
        return self.function(*given, **values)

    def _given(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = {n: v for n, v in self.values.items() if n not in (*_NAMES[:5], *_SHAPES)}
        values |= {"skip_reshape": True} if query.ndim == 4 else {}
        return (query, key, value, self.heads), values if mask is None else {**values, "mask": mask}

    def flat(self, output: Tensor) -> Tensor:
        """Its output (rows, n, channels)."""
        return output.transpose(1, 2).flatten(2) if self.values.get("skip_output_reshape") else output

    def returned(self, output: Tensor) -> Tensor:
        """An output (rows, n, channels) as the caller wants it."""
        return (
            output.unflatten(2, (self.heads, -1)).transpose(1, 2) if self.values.get("skip_output_reshape") else output
        )
