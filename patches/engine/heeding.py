"""Whether an attention function that another pack put in the place of the host's heeds masks. Tensors only.

Fast ones do not all: some take a mask and leave it away without a word. Nothing says so, but the result does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .bias import per_head
from .execution import Attend
from .forms import head_split

# Queries that are looked at in an attention, and attentions in which nothing can be told before it counts as heeding.
_QUERIES = 8
_ATTENTIONS = 16


def heeds(output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> bool | None:
    """Whether `output` of an attention is the one with the mask, not the one without: by some queries of its first row,
    computed anew. None where the two hardly differ; what is neither counts as one with the mask, which some function
    went on with."""
    places = torch.linspace(0, query.shape[-2] - 1, _QUERIES, device=query.device).long().unique()
    q, k, v = (head_split(each, heads) for each in (query[:1, ..., places, :], key[:1], value[:1]))
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    bias = mask[:1] if mask.shape[1] == 1 else mask[:1, places]
    without, right = ((each.softmax(-1) @ v).transpose(1, 2).flatten(2) for each in (logits, logits + per_head(bias)))
    gap = float((right - without).norm())
    if gap < 0.02 * float(without.norm()):
        return None
    return float((output[:1, places].float() - without).norm()) > 0.25 * gap


@dataclass
class Heeding:
    """What is known of one run's attention function; `tell` is called when it turns out not to heed masks."""

    tell: Callable[[], None]
    heeds: bool | None = None
    asked: int = 0

    def attend(self, theirs: Attend, hosts: Attend, heads: int) -> Attend:
        """An attention by another pack's function, and by the host's where that would leave a mask away."""

        def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            if mask is None or self.heeds:
                return theirs(query, key, value, mask)
            if self.heeds is None:
                output = theirs(query, key, value, mask)
                self.asked += 1
                found = heeds(output, query, key, value, mask, heads)
                self.heeds = True if found is None and self.asked == _ATTENTIONS else found
                if self.heeds is not False:
                    return output
                self.tell()
            return hosts(query, key, value, mask)

        return attended
