"""The numbers of the papers' published code, as the tests take them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor

# Those of the repository, or others by the environment.
_GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "golden")


@dataclass(frozen=True)
class Golden:
    """A case: its settings, and the tensors that went in and came out."""

    name: str
    case: dict[str, Any]
    tensors: dict[str, Tensor]


Kind = TypeVar("Kind", bound=Golden)


def folder_of(code: str) -> Path:
    """Where the cases of some published code lie."""
    return _GOLDEN / code if (_GOLDEN / code).is_dir() else _GOLDEN


def file_of(code: str, name: str) -> Path:
    """A file that the cases of some published code share: the one beside them, else the repository's."""
    beside = folder_of(code) / name
    return beside if beside.is_file() else Path(__file__).parents[1] / "golden" / code / name


def cases_of(code: str, kind: type[Kind], wanted: Callable[[Kind], bool]) -> list[Kind]:
    """The cases of some published code, as `kind`, that are `wanted`; each file that says so is one."""
    found = []
    for path in sorted(folder_of(code).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if "case" not in about:
                continue
            case = json.loads(about["case"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors file is no mapping)
        found.append(kind(case.get("name", path.stem), case, tensors))
    chosen = [each for each in found if wanted(each)]
    assert chosen or "GOLDEN_DIR" in os.environ, f"there are no such cases in {folder_of(code)}"
    return chosen
