"""AnyStory's equations on FLUX, as its authors published them: windows, who attends to whom, and the router's maps.

The picture and the prompt attend to each subject's own tokens, put behind the prompt, and to its reference, which runs
through the same FLUX at timestep 0 with a LoRA. A router gives every place of the picture to one subject, anew in every
block, and takes the other subjects' tokens and references from that place. The prompt is not routed. None of this is in
the paper, whose model is a U-Net; where the authors add -100 to logits, so does this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What the authors add to the logits of keys that a query shall not see.
UNSEEN = -100.0
# Keys whose logits are lowered by more than this are left out: the rest is less than rounding.
NEGLIGIBLE = -60.0


def steps_of(start: float, end: float, steps: int) -> range:
    """The steps that a window of shares of the schedule means: both bounds rounded half up to whole steps."""
    return range(int(steps * start + 0.5), int(steps * end + 0.5))


def step_at(sigma: float, sigmas: Sequence[float]) -> int:
    """Which step of a schedule (falling `sigmas`, one more than steps) a noise level belongs to: the last that begins
    at it or above."""
    return max(sum(level >= sigma * (1 - 1e-6) for level in sigmas[:-1]) - 1, 0)


def reference_bias(mask: Tensor, shift: float) -> Tensor:
    """What is added to the logits of a reference's keys: `mask` of 0 to 1, any shape."""
    return shift - UNSEEN * (mask - 1)


def mean_queries(query: Tensor, subjects: int) -> Tensor:
    """One routing query a subject: the mean over heads and over its router tokens, of the rotated queries (rows,
    heads, subjects * tokens, width), subjects one after the other: (rows, subjects, width)."""
    return query.unflatten(2, (subjects, -1)).mean((1, 3))


def routing_logits(queries: Tensor, keys: Tensor) -> Tensor:
    """How well each place fits each subject: `queries` (rows, subjects, width), `keys` (rows, places, width), means
    over heads of the rotated keys. Not scaled. (rows, subjects, places)."""
    return queries @ keys.mT


def routes(logits: Tensor) -> Tensor:
    """The subject of each place, one-hot over subjects: (rows, subjects, places) bool. There is no background."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)


def attention_bias(maps: Tensor | None, subjects: int, own: int, tokens: int, references: Tensor | None) -> Tensor:
    """All that the authors add to the logits of a picture's queries: (rows, places, own + subjects * tokens + n).

    Of the keys, `own` come first and see nothing added, then `tokens` of each subject, then the references' n, with
    what `reference_bias` gives (rows or 1, n), subjects one after the other. `maps` are the `routes`, or None. The
    engine computes the same without this matrix, by grouping the places of one subject; it is here to be read and to
    test against."""
    rows, places = (1, 1) if maps is None else (maps.shape[0], maps.shape[2])
    given = torch.zeros(rows, 0) if references is None else references.expand(rows, -1)
    lowered = torch.zeros(rows, places, subjects * tokens + given.shape[1])
    lowered[..., subjects * tokens :] = given[:, None]
    if maps is not None:
        misrouted = UNSEEN * (1 - maps.float()).mT
        lowered[..., : subjects * tokens] += misrouted.repeat_interleave(tokens, -1)
        lowered[..., subjects * tokens :] += misrouted.repeat_interleave(given.shape[1] // subjects, -1)
    return torch.cat([torch.zeros(rows, places, own), lowered], -1)
