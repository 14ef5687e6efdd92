"""Attention as the equations say it, dense and in float64: what the engine's outputs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from subject_patches.patches.engine.amendments import Extension
from torch import Tensor


def split(tokens: Tensor, heads: int) -> Tensor:
    """(rows, tokens, channels) to (rows, heads, tokens, channels / heads)."""
    rows, count, channels = tokens.shape
    return tokens.double().reshape(rows, count, heads, channels // heads).permute(0, 2, 1, 3)


def logits_of(query: Tensor, key: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """QK^T / sqrt(d) plus a bias over (rows, queries, keys): (rows, heads, queries, keys)."""
    q, k = split(query, heads), split(key.expand(query.shape[0], -1, -1), heads)
    scores = torch.einsum("rhqd,rhkd->rhqk", q, k) / q.shape[-1] ** 0.5
    if bias is None:
        return scores
    return scores + bias.double().expand(query.shape[0], query.shape[1], key.shape[1])[:, None]


def shares(
    query: Tensor, key: Tensor, heads: int, own_bias: Tensor | None = None, extensions: Sequence[Extension] = ()
) -> Tensor:
    """The softmax over own and extended keys: (rows, heads, queries, all keys)."""
    parts = [logits_of(query, key, heads, own_bias)]
    for extension in extensions:
        scores = logits_of(query, extension.key, heads, extension.bias)
        if extension.route is not None:
            seen = extension.route.expand(query.shape[0], -1)
            scores = scores.masked_fill(~seen[:, None, :, None], -torch.inf)
        parts.append(scores)
    return torch.cat(parts, -1).softmax(-1)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    own_bias: Tensor | None = None,
    extensions: Sequence[Extension] = (),
    blends: Sequence[Callable[[Tensor], Tensor]] = (),
) -> Tensor:
    """One attention with everything that may have been amended: (rows, queries, channels) in float64."""
    rows = query.shape[0]
    values = torch.cat([split(v.expand(rows, -1, -1), heads) for v in (value, *(e.value for e in extensions))], 2)
    output = shares(query, key, heads, own_bias, extensions) @ values
    output = output.permute(0, 2, 1, 3).reshape(rows, query.shape[1], -1)
    for function in blends:
        output = function(output)
    return output
