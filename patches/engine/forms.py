"""The two forms of an attention's tokens: (rows, tokens, channels), and with heads apart, (rows, heads, tokens,
width). Tensors only."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def head_split(tokens: Tensor, heads: int) -> Tensor:
    """(rows, tokens, channels) to (rows, heads, tokens, channels / heads) in float32, where they are not so already."""
    return tokens.float() if tokens.ndim == 4 else tokens.float().unflatten(-1, (heads, -1)).transpose(1, 2)


def formed(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (rows, n, channels) in the form of `like`, which has as many channels, or of that form already."""
    return tokens if tokens.ndim == like.ndim else tokens.unflatten(-1, (like.shape[1], -1)).transpose(1, 2)


class Given:
    """A call's query, key or value. The attentions of most transformers have heads apart, (rows, heads, tokens, width);
    as edits see them, (rows, tokens, channels), they are copied, so only when one looks."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.given, self.flat = f"_{name}", f"_flat_{name}"

    def __set__(self, call: Any, tokens: Tensor) -> None:
        vars(call)[self.given] = tokens
        vars(call)[self.flat] = tokens if tokens.ndim == 3 else None

    def __get__(self, call: Any, owner: type) -> Tensor:
        if call is None:
            # A field without a default.
            raise AttributeError(self.given)
        if vars(call)[self.flat] is None:
            vars(call)[self.flat] = vars(call)[self.given].transpose(1, 2).flatten(2)
        return vars(call)[self.flat]
