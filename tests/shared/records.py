"""Sampling runs with Record Attention."""

from __future__ import annotations

from typing import Any

from subject_patches.nodes.attention_inspector import RecordAttentionNode
from subject_patches.patches.pictures.attention_record import AttentionRecord
from torch import Tensor

from .models import sample


def recorded(model: Any, run: dict[str, Any] | None = None, **values: Any) -> tuple[AttentionRecord, Tensor]:
    """What the node recorded of a run, and what came out of it; `values` are its inputs."""
    patched, runs = RecordAttentionNode.execute(model, **values).args
    result = sample(patched, **(run or {}))
    return runs.last, result
