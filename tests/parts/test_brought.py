"""What a run brings to its device is brought once."""

from __future__ import annotations

import torch
from subject_patches.patches.parts.brought import Brought


def test_a_copy_is_made_once() -> None:
    brought, tensors, half = Brought(), (torch.ones(2), torch.zeros(3)), torch.zeros(1, dtype=torch.float16)
    copies = brought.to(half, tensors, "one")
    assert [each.dtype for each in copies] == [torch.float16] * 2
    assert all(a is b for a, b in zip(copies, brought.to(half, tensors, "one"), strict=True))
    assert brought.to(half, tensors[1:], "other")[0].shape == (3,)
    assert brought.to(torch.zeros(1), tensors, "one")[0].dtype == torch.float32
    assert brought.to(torch.zeros(1, device="meta"), tensors, "one")[0].device.type == "meta"
