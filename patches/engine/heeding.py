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


def heeds(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, differs: Tensor, heads: int
) -> bool | None:
    """Whether `output` of an attention is the one with the mask, not the one without: by some queries of one row,
    computed anew, at which the mask `differs` most from key to key (`spread`). None where the two hardly differ; what
    is neither counts as one with the mask, which some function went on with."""
    at = int(differs.amax(1).argmax()) if len(mask) > 1 else 0
    row = slice(at, at + 1)
    if mask.shape[1] == 1:
        places = torch.linspace(0, query.shape[-2] - 1, _QUERIES, device=query.device).long().unique()
        bias = mask[row]
    else:
        places = differs[at].topk(min(_QUERIES, mask.shape[1])).indices
        bias = mask[row, places]
    q, k, v = (head_split(each, heads) for each in (query[row, ..., places, :], key[row], value[row]))
    logits = (q @ k.mT) * q.shape[-1] ** -0.5
    without, right = ((each.softmax(-1) @ v).transpose(1, 2).flatten(2) for each in (logits, logits + per_head(bias)))
    gap = float((right - without).norm())
    if gap < 0.02 * float(without.norm()):
        return None
    return float((output[row, places].float() - without).norm()) > 0.25 * gap


def spread(mask: Tensor) -> Tensor:
    """By how much a mask (rows, queries, keys) differs over the keys: (rows, queries) in float32. Where it hides all of
    them it differs by nothing."""
    return (mask.amax(-1) - mask.amin(-1)).float().nan_to_num(0.0)


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
                differs = spread(mask)
                if not bool(differs.any()):
                    # The same for all keys does nothing, so nothing can be told of it.
                    return output
                self.asked += 1
                found = heeds(output, query, key, value, mask, differs, heads)
                self.heeds = True if found is None and self.asked == _ATTENTIONS else found
                if self.heeds is not False:
                    return output
                self.tell()
            return hosts(query, key, value, mask)

        return attended
