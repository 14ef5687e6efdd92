"""tools/convert.py: a residual token as Cones 2's authors publish it becomes a file that Load Residual Token reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convert
import pytest
import torch
from hosting.errors import ToolError
from subject_patches.nodes.residual import read_residual_token
from subject_patches.patches.mechanisms.residual import add_residual

from ..shared.models import generator


def published(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(("shape", "noun"), [((1, 1024), "dog"), ((1024,), "dog"), ((1, 2, 1024), "teddy bear")])
def test_published_residual(tmp_path: Path, shape: tuple[int, ...], noun: str) -> None:
    """One vector for each token of the noun arrives as it is, and is what stands at the noun's tokens."""
    vectors = torch.randn(shape, generator=generator(3))
    source = published(tmp_path / "subject.pt", torch.nn.Parameter(vectors) if len(shape) == 1 else vectors)
    said = convert.convert_residual(source, tmp_path / "subject.safetensors", f" {noun} ")
    assert "models/residual_tokens" in said
    residual = read_residual_token(tmp_path / "subject.safetensors")
    assert residual.noun == noun
    assert torch.equal(residual.vectors, vectors.reshape(-1, 1024))
    context = torch.zeros(1, 5, 1024)
    positions = list(range(2, 2 + len(residual.vectors)))
    assert torch.equal(add_residual(context, residual.vectors, positions)[0, positions], residual.vectors)


def test_half_precision(tmp_path: Path) -> None:
    vectors = torch.randn(1, 1024, generator=generator(4)).half()
    convert.convert_residual(published(tmp_path / "a.pt", vectors), tmp_path / "a.safetensors", "dog")
    assert torch.equal(read_residual_token(tmp_path / "a.safetensors").vectors, vectors.float())


@pytest.mark.parametrize(
    ("content", "noun", "sentence"),
    [
        (torch.zeros(1, 768), "dog", r"a tensor of shape \(1, 768\); a residual token of Cones 2 is one vector"),
        (torch.zeros(0, 1024), "dog", r"shape \(0, 1024\)"),
        (torch.zeros(1, 1024, dtype=torch.long), "dog", "is no residual token: the residual is kept as torch.int64"),
        (torch.full((1, 1024), float("inf")), "dog", "values that are not finite"),
        ({"ref": {}}, "dog", "holds no tensor but dict; leave --noun away"),
        (torch.zeros(1, 1024), "  ", "The noun is empty"),
        (torch.tensor(1.0), "dog", "a residual token"),
    ],
)
def test_what_is_no_residual(tmp_path: Path, content: Any, noun: str, sentence: str) -> None:
    source = published(tmp_path / "other.pt", content)
    with pytest.raises(ToolError, match=sentence):
        convert.convert_residual(source, tmp_path / "out.safetensors", noun)
    assert list(tmp_path.iterdir()) == [source]


def test_residual_without_its_noun(tmp_path: Path) -> None:
    source = published(tmp_path / "dog.pt", torch.zeros(1, 1024))
    with pytest.raises(ToolError, match="if it is a residual token of Cones 2, say its noun"):
        convert.convert(source, tmp_path / "out.safetensors")
