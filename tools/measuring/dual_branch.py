"""Dual-branch integration: what a concept's identity and the prompt's scene make of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .given import Shape, concept_tokens


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: the paper's window, with both kinds of guidance."""
    import torch
    from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
    from subject_patches.patches.dual_branch import BRANCH_KEY, BranchTokens

    generator = torch.Generator().manual_seed(2)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)} if shape.name == "sdxl" else {}
    auxiliary = {**pooled, BRANCH_KEY: BranchTokens(((1, 7),), ((2, 3),))}

    def integrated(**settings: Any) -> Callable[[Any], Any]:
        def patch(model: Any) -> Any:
            prompt = torch.randn(1, 77, shape.width, generator=generator)
            given = {"injection_strength": 1.0, "strength": 1.0, "end_percent": 0.15, **settings}
            concept = [[prompt, {BRANCH_KEY: concept_tokens()}]]
            return DualBranchIntegrationNode.execute(model, concept, [[prompt, auxiliary]], **given).args[0]

        return patch

    return {
        "dual-branch integration, 15 % of the steps": integrated(),
        "dual-branch integration, 15 % of the steps, guidance of its own": integrated(guidance="own"),
    }
