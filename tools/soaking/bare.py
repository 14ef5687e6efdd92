"""Workflows without the pack's patches: what the host alone makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hosting.client import ApiPrompt

from .described import PACK, gives


def without_patches(prompt: ApiPrompt, known: dict[str, Any]) -> ApiPrompt:
    """The same workflow without the pack's patches: what takes a patched MODEL takes the one that was given."""
    given = {
        number: node["inputs"]["model"]
        for number, node in prompt.items()
        if node["class_type"].startswith(PACK)
        and gives(known, node["class_type"], "MODEL")
        and isinstance(node["inputs"].get("model"), list)
    }

    def bare(value: Any) -> Any:
        while isinstance(value, list) and value and value[0] in given and _is_model(prompt, known, value):
            value = given[value[0]]
        return value

    return {
        number: {**node, "inputs": {name: bare(value) for name, value in node["inputs"].items()}}
        for number, node in prompt.items()
    }


def _is_model(prompt: ApiPrompt, known: dict[str, Any], link: Sequence[Any]) -> bool:
    return known[prompt[link[0]]["class_type"]]["output"][link[1]] == "MODEL"
