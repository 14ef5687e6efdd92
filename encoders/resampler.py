"""The resampler: a few learned queries that read a picture's many features into a few tokens.

AnyStory's QFormer (section 3.2) and the projection of IP-Adapter Plus are this same network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FEED_FORWARD = 4


class ReadingAttention(nn.Module):
    """Attn(LN latents; [LN x, LN latents]): the latents (rows, n, width) read the features and one another."""

    def __init__(self, width: int, inner: int, heads: int, operations: Any) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = operations.LayerNorm(width), operations.LayerNorm(width)
        self.to_q = operations.Linear(width, inner, bias=False)
        self.to_kv = operations.Linear(width, 2 * inner, bias=False)
        self.to_out = operations.Linear(inner, width, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        key, value = self.to_kv(torch.cat([self.norm1(features), latents], 1)).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(latents), key, value))
        return self.to_out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """`queries` tokens of the width `context` from features (rows, n, `features`), in `depth` layers of the given
    `width`, whose attention is `inner` wide.

    A layer is latents += Attn(LN latents; [LN x, LN latents]), then latents += a feed-forward of four times the width;
    the tokens are LN(W_out latents). The parameters have the names of IP-Adapter Plus's published files. `operations`
    has the layers' classes: torch's own, or the host's, which cast their weights to what they are given."""

    def __init__(
        self,
        features: int,
        context: int,
        *,
        width: int,
        queries: int,
        inner: int,
        heads: int,
        depth: int,
        operations: Any = nn,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, width) / width**0.5)
        self.proj_in, self.proj_out = operations.Linear(features, width), operations.Linear(width, context)
        self.norm_out = operations.LayerNorm(context)
        self.layers = nn.ModuleList(
            nn.ModuleList([ReadingAttention(width, inner, heads, operations), feed_forward(width, operations)])
            for _ in range(depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        features = self.proj_in(features)
        latents = self.latents.to(features).expand(len(features), -1, -1)
        for read, further in self.layers:
            latents = latents + read(features, latents)
            latents = latents + further(latents)
        return self.norm_out(self.proj_out(latents))


def feed_forward(width: int, operations: Any) -> nn.Sequential:
    """A normalised feed-forward of FEED_FORWARD times the width."""
    wide = FEED_FORWARD * width
    return nn.Sequential(
        operations.LayerNorm(width),
        operations.Linear(width, wide, bias=False),
        nn.GELU(),
        operations.Linear(wide, width, bias=False),
    )
