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
_GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parent / "golden")


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


def cases_of(code: str, kind: type[Kind], wanted: Callable[[Kind], bool]) -> list[Kind]:
    """The cases of some published code, as `kind`, that are `wanted`; each file is one."""
    found = []
    for path in sorted(folder_of(code).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            case = json.loads(file.metadata()["case"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a safetensors file is no mapping)
        found.append(kind(case["name"], case, tensors))
    chosen = [each for each in found if wanted(each)]
    assert chosen or "GOLDEN_DIR" in os.environ, f"there are no such cases in {folder_of(code)}"
    return chosen
