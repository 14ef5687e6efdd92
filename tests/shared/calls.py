"""Attention calls of random tensors, executed and compared with dense attention in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from comfy.ldm.modules import attention as host
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.execution import Attend, execute
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared import dense
from torch import Tensor

SITE = Site("self", "middle", 0, 0)
CHUNK = Chunk(slice(0, 1), "positive", True, {}, (8, 8))
TOLERANCE = 1e-5


@dataclass
class Counted:
    """One of the host's attention functions, with the shapes it was called with."""

    heads: int
    function: Attend = host.attention_pytorch
    masks: list[tuple[int, ...] | None] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        self.masks.append(None if mask is None else tuple(mask.shape))
        return self.function(query, key, value, self.heads, mask, skip_reshape=query.ndim == 4)


def make_call(rows: int = 2, queries: int = 9, keys: int = 7, heads: int = 3, width: int = 4) -> AttentionCall:
    """A call that nothing has amended yet."""
    channels = heads * width
    tensors = (torch.randn(rows, count, channels) for count in (queries, keys, keys))
    return AttentionCall(*tensors, heads, SITE, CHUNK, None)


def expected(call: AttentionCall) -> Tensor:
    """What the dense attention says of it."""
    blends = [blend.function for blend in call.blends]
    return dense.attention(
        call.query, call.key, call.value, call.heads, call.bias_of(), call.extensions, blends
    ).float()


def with_heads_apart(call: AttentionCall) -> AttentionCall:
    """The same call as it would have been given by a transformer that splits heads before it attends."""
    names = ("query", "key", "value")
    return replace(call, **{name: dense.split(getattr(call, name), call.heads).float() for name in names})


def assert_exact(call: AttentionCall, attend: Counted | None = None) -> None:
    """In both forms that a call may come in."""
    attend = attend or Counted(call.heads)
    apart = Counted(call.heads, attend.function)
    for each, counted in ((call, attend), (with_heads_apart(call), apart)):
        (output,) = execute([each], counted)
        torch.testing.assert_close(output, expected(call), rtol=0, atol=TOLERANCE)
    assert apart.masks == attend.masks
