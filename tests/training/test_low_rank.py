"""Changes of weights as two thin matrices: the best for the prompts that ask them, by error."""

from __future__ import annotations

import pytest
import torch
from subject_patches.tests.shared.models import randn
from subject_patches.training.concept import as_lora
from subject_patches.training.low_rank import covariance, directions, factors, rank_for
from torch import Tensor


def missed(change: Tensor, up: Tensor, down: Tensor, tokens: Tensor) -> float:
    """What is missed of what the change does to tokens (n, in), as a share."""
    return float(((change - up @ down) @ tokens.T).norm() / (change @ tokens.T).norm())


def tokens_of(contexts: Tensor) -> Tensor:
    return torch.nn.functional.normalize(contexts.flatten(0, 1), dim=-1)


@pytest.mark.parametrize("error", [0.5, 0.2, 0.02])
@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_a_rank_by_error(size: tuple[int, int], error: float) -> None:
    change, contexts = randn(*size), randn(3, 9, size[1], seed=1) @ torch.diag(torch.linspace(0.01, 1, size[1]) ** 4)
    spread = covariance(contexts)
    _, values = directions(change, spread)
    rank = rank_for(values, error)
    vectors, _ = directions(change, spread)
    for kept, enough in ((rank, True), (rank - 1, False)):
        up = vectors[:, :kept].float()
        assert (missed(change, up, up.T @ change, tokens_of(contexts)) <= error + 1e-4) == enough


def test_thin_matrices_are_the_best_of_their_rank() -> None:
    change, contexts = randn(48, 64), randn(2, 30, 64, seed=1) * torch.linspace(0.1, 3, 64)
    up, down = factors(change, covariance(contexts), 5, 0.0)
    assert (up.shape, down.shape) == ((48, 5), (5, 64))
    tokens = tokens_of(contexts)
    # Of D C^(1/2), by the decomposition itself.
    values = torch.linalg.svdvals(change @ tokens.T)
    best = float(values[5:].square().sum().sqrt() / values.square().sum().sqrt())
    assert missed(change, up, down, tokens) == pytest.approx(best, rel=1e-3)
    # In half precision too, however small the change.
    halves = as_lora({"a.weight": torch.zeros(48, 64)}, {"a.weight": change * 1e-5}, covariance(contexts), 5)
    low = halves["diffusion_model.a.lora_up.weight"].float() @ halves["diffusion_model.a.lora_down.weight"].float()
    assert missed(change * 1e-5, low, torch.eye(64), tokens) == pytest.approx(best, rel=1e-2)


def test_what_would_be_no_smaller_stays_whole() -> None:
    change = randn(6, 8)
    assert factors(change, torch.eye(8), 4, 0.0) is None
    assert factors(change, torch.eye(8), 0, 0.0) is None
    assert factors(change, torch.eye(8), 3, 0.0) is not None
    assert factors(torch.zeros(6, 8), torch.eye(8), 0, 0.1)[0].shape == (6, 1)
