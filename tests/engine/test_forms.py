"""The two forms of an attention's tokens: what is in one is in the other."""

from __future__ import annotations

import torch
from subject_patches.patches.engine.forms import formed, head_split


def test_heads_are_put_apart() -> None:
    """In the order in which they lie beside each other, as many tokens; to be looked at in float32."""
    tokens = torch.randn(2, 5, 12)
    apart = torch.stack(tokens.split(4, -1), 1)
    for like, expected in ((tokens, tokens), (apart, apart)):
        assert torch.equal(formed(tokens, like[..., :1, :]), expected)
    assert torch.equal(formed(apart, apart[..., :1, :]), apart)
    for given in (tokens, apart):
        assert torch.equal(head_split(given.half(), 3), apart.half().float())
