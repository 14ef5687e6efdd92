"""Tokens in one form are the same tokens in the other."""

from __future__ import annotations

import torch
from subject_patches.patches.engine.forms import formed, head_split


def test_each_form_is_made_of_the_other() -> None:
    tokens = torch.randn(2, 5, 12)
    apart = torch.stack(tokens.split(4, -1), 1)
    for like, expected in ((tokens, tokens), (apart, apart)):
        assert torch.equal(formed(tokens, like[..., :1, :]), expected)
        assert torch.equal(formed(apart, like[..., :1, :]), expected)
    assert torch.equal(head_split(tokens, 3), apart)
    assert torch.equal(head_split(apart.half(), 3), apart.half().float())
