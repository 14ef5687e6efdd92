"""AnyStory's router on U-Nets (section 3.3): which place of a layer belongs to which subject.

Of what a vision model sees of a subject a QFormer with one query makes its routing feature R_i; the one of an empty
picture is the background's, R_N+1. In each cross-attention the projected inner products of R and the layer's features
are the coarse maps. R then reads the features where its own coarse map is the highest, and the inner products with what
it has become are the refined maps M: a small decoder of image segmentation.

The paper does not say the router's widths and heads, nor whether M is a softmax; here it is one over subjects and
background, so that a place is shared out. For a layer's features its queries stand, which the host's patches see: W_q
is a square linear map of them, and the router's own projections may undo it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..patches.parts.sites import Site
from .by_site import module_at, put
from .resampler import Resampler, feed_forward

# What a file writes before the names of a router's tensors, and the entry of its metadata that tells the sizes.
ROUTER, ROUTER_ENTRY = "router.", "router"


@dataclass(frozen=True)
class RouterForm:
    """A router's sizes: the channels of a routing feature, and the heads of the attention that refines it."""

    width: int
    heads: int

    def said(self) -> str:
        """What metadata say of it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str) -> RouterForm:
        """Raises ValueError with a phrase where the metadata do not say it."""
        try:
            told = json.loads(text)
            form = cls(int(told["width"]), int(told["heads"]))
            if min(form.width, form.heads) < 1 or form.width % form.heads:
                raise ValueError(f"{form.heads} heads of {form.width} channels")
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"what it says of its router is not whole ({error})") from error
        return form


def inner_products(places: Tensor, features: Tensor) -> Tensor:
    """What a softmax over subjects makes maps of: (rows, n, places), of projected features of the `places` (rows,
    places, width) and of `features` (rows, n, width)."""
    return features @ places.mT / places.shape[-1] ** 0.5


def own_places(logits: Tensor) -> Tensor:
    """Where each subject's map is the highest, (rows, n, places) bool; everywhere for one that is so nowhere, as in
    Mask2Former's masked attention, which the paper takes over."""
    highest = functional.one_hot(logits.argmax(1), logits.shape[1]).mT.bool()
    return highest | ~highest.any(-1, keepdim=True)


class Matching(nn.Module):
    """Projected inner products of places and routing features."""

    def __init__(self, channels: int, width: int, operations: Any) -> None:
        super().__init__()
        self.to_z = operations.Linear(channels, width, bias=False)
        self.to_r = operations.Linear(width, width, bias=False)

    def forward(self, places: Tensor, features: Tensor) -> Tensor:
        return inner_products(self.to_z(places), self.to_r(features))


class Reading(nn.Module):
    """R' = R + masked cross-attention(R, Z), then R' + a feed-forward of four times the width."""

    def __init__(self, channels: int, form: RouterForm, operations: Any) -> None:
        super().__init__()
        width, self.heads = form.width, form.heads
        self.norm_r, self.norm_z = operations.LayerNorm(width), operations.LayerNorm(channels)
        self.to_q = operations.Linear(width, width, bias=False)
        self.to_kv = operations.Linear(channels, 2 * width, bias=False)
        self.to_out = operations.Linear(width, width, bias=False)
        self.feed_forward = feed_forward(width, operations)

    def forward(self, places: Tensor, features: Tensor, own: Tensor) -> Tensor:
        key, value = self.to_kv(self.norm_z(places)).chunk(2, -1)
        query = self.to_q(self.norm_r(features))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        read = functional.scaled_dot_product_attention(q, k, v, own[:, None]).transpose(1, 2).flatten(2)
        features = features + self.to_out(read)
        return features + self.feed_forward(features)


class RouterLayer(nn.Module):
    """The router of one cross-attention layer of so many channels."""

    def __init__(self, channels: int, form: RouterForm, operations: Any) -> None:
        super().__init__()
        self.coarse = Matching(channels, form.width, operations)
        self.refine = Reading(channels, form, operations)
        self.refined = Matching(channels, form.width, operations)

    def forward(self, places: Tensor, features: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the coarse and of the refined maps (rows, n, places), of a layer's features (rows, places,
        channels) and routing features (rows, n, width), the background's last. `present` (rows, n) bool says which of
        them are there, None all; those that are not have no place."""
        coarse = _of_those(self.coarse(places, features), present)
        features = self.refine(places, features, own_places(coarse))
        return coarse, _of_those(self.refined(places, features), present)


class RouterModules(nn.Module):
    """The router of a file, in its names: for a U-Net whose cross-attentions have these `channels`, and for a QFormer
    of so many `features`, `width`, `heads` and layers (`depth`) as the encoder's own; `operations` has the layers'
    classes."""

    def __init__(
        self,
        form: RouterForm,
        channels: Mapping[Site, int],
        operations: Any,
        *,
        features: int,
        width: int,
        heads: int,
        depth: int,
    ) -> None:
        super().__init__()
        self.sites = frozenset(channels)
        self.qformer = Resampler(
            features, form.width, width=width, queries=1, inner=width, heads=heads, depth=depth, operations=operations
        )
        for site, count in channels.items():
            put(self, site, RouterLayer(count, form, operations))

    def features(self, seen: Tensor) -> Tensor:
        """R (rows, width) of what a vision model sees of pictures (rows, n, features)."""
        return self.qformer(seen)[:, 0]

    def maps(
        self, site: Site, places: Tensor, features: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `RouterLayer`, of a layer."""
        return module_at(self, site)(places, features, present)


def _of_those(logits: Tensor, present: Tensor | None) -> Tensor:
    return logits if present is None else logits.masked_fill(~present[..., None], torch.finfo(logits.dtype).min)
