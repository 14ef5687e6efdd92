"""weights_manifest.json is true: of every weight file in the repository, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import manifest
import pytest
import torch
from hosting.base import MANIFEST
from hosting.errors import ToolError
from hosting.paths import ROOT
from safetensors.torch import save_file

ENTRIES = json.loads(MANIFEST.read_text(encoding="utf-8"))["entries"]
SCHEMA = json.loads(MANIFEST.with_suffix(".schema.json").read_text(encoding="utf-8"))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weight file in a repository of its own."""
    monkeypatch.setattr(manifest, "ROOT", tmp_path)
    path = tmp_path / "weights" / "small.safetensors"
    path.parent.mkdir()
    save_file(
        {
            "blocks.0.weight": torch.zeros(4, 2),
            "blocks.1.weight": torch.zeros(4, 4),
            "blocks.1.bias": torch.zeros(4),
            "scale": torch.zeros(()),
            "conv2d.weight": torch.zeros(1),
        },
        path,
    )
    return path


@pytest.fixture
def entry(weights: Path) -> dict[str, Any]:
    """The manifest's entry of that file."""
    return manifest.new_entry(weights, "small", "toy", "checkpoints", "python -m train")


def test_manifest_follows_its_schema() -> None:
    """The schema is a valid one, and the manifest is what it asks for."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(MANIFEST.read_text(encoding="utf-8")), SCHEMA, jsonschema.Draft202012Validator)


def test_entries_are_true() -> None:
    """Of each file that the repository has: name, size, hash, and one pattern for each tensor."""
    assert [fault for entry in ENTRIES if entry["path"] for fault in manifest.faults(entry)] == []


def test_every_weight_file_has_one_entry() -> None:
    """No weight file is shipped without an entry, and none has two."""
    found = (path for name in ("weights", "encoders", "loras") for path in ROOT.glob(f"*/{name}/*.safetensors"))
    shipped = sorted(path.relative_to(ROOT).as_posix() for path in found)
    assert sorted(entry["path"] for entry in ENTRIES if entry["path"]) == shipped
    assert len({entry["id"] for entry in ENTRIES}) == len(ENTRIES)


def test_manifest_is_kept_as_the_tool_writes_it() -> None:
    """Refreshing a true manifest changes no byte of it."""
    text = MANIFEST.read_text(encoding="utf-8")
    assert manifest.to_text(json.loads(text)) == text


def test_new_entry_describes_the_file(entry: dict[str, Any], weights: Path) -> None:
    """Numbers between separators become *, shapes are gathered, and the outcome follows the schema."""
    assert entry["tensors"] == [
        {"name": "blocks.*.weight", "shapes": [[4, 2], [4, 4]]},
        {"name": "blocks.*.bias", "shapes": [[4]]},
        {"name": "conv2d.weight", "shapes": [[1]]},
        {"name": "scale", "shapes": [[]]},
    ]
    assert entry["bytes"] == weights.stat().st_size
    assert entry["path"] == "weights/small.safetensors"
    text = manifest.to_text({"entries": [entry]})
    jsonschema.validate(json.loads(text), SCHEMA, jsonschema.Draft202012Validator)
    assert '        {"name": "blocks.*.weight", "shapes": [[4, 2], [4, 4]]},\n' in text
    assert manifest.faults(entry) == []


def test_faults_are_found(entry: dict[str, Any], weights: Path) -> None:
    """A wrong hash, a wrong size, a tensor without a pattern or with two, and a pattern without a tensor."""
    wrong = entry | {"sha256": "0" * 64}
    assert "SHA-256" in manifest.faults(wrong)[0]
    assert "bytes" in manifest.faults(entry | {"bytes": 1})[0]
    assert "0 patterns match the tensor scale" in manifest.faults(entry | {"tensors": entry["tensors"][:3]})[0]
    twice = [*entry["tensors"], {"name": "blocks.1.bias", "shapes": [[4]]}]
    assert "2 patterns match the tensor blocks.1.bias" in manifest.faults(entry | {"tensors": twice})[0]
    idle = [*entry["tensors"], {"name": "absent", "shapes": [[4]]}]
    assert manifest.faults(entry | {"tensors": idle}) == ["no tensor matches the pattern absent"]
    weights.unlink()
    assert manifest.faults(entry) == ["weights/small.safetensors is missing"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0{}"])
def test_broken_weights_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    """What is no safetensors file is refused by name."""
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ToolError, match="cannot be read as a safetensors file"):
        manifest.tensor_shapes(path)
