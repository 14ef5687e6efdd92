"""Workflows that nobody would make: each of the pack's nodes in turn, or several in any order, with inputs drawn from
what the server publishes of them, some of them odd. What is drawn depends on that, the seed and the case's number."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from hosting.client import ApiPrompt

from .builder import OF_THE_TOY, Builder
from .described import PACK, gives, types_of
from .homes import WEIGHTS


@dataclass(frozen=True)
class Case:
    """A workflow; `told` says which of its inputs are odd, `home` whose model it begins with."""

    number: int
    home: str
    nodes: tuple[str, ...]
    prompt: ApiPrompt
    told: tuple[str, ...]

    def __str__(self) -> str:
        kinds = " > ".join(kind.removeprefix(PACK) for kind in self.nodes)
        return f"case {self.number}, {self.home}: {kinds}: {'; '.join(self.told) or 'nothing odd'}"


def case_of(seed: int, number: int, known: dict[str, Any]) -> Case:
    """The case of a number; `known` is the server's object_info."""
    rng = random.Random(f"{seed} {number}")  # noqa: S311, nothing is to be kept secret
    kinds = sorted(name for name in known if name.startswith(PACK))
    patches = [kind for kind in kinds if "Train" not in kind and gives(known, kind, "MODEL")]
    chained = number % 4 == 3
    # Each node in turn: every fourth case is a chain, so the others count three of four.
    chosen = [kinds[(number - number // 4) % len(kinds)]]
    if chained:
        chosen = [rng.choice(patches) for _ in range(rng.randint(2, 4))]
    home = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    types = " ".join(kind for node in chosen for kind in types_of(known, node))
    if "ANYSTORY" in types:
        home = "flux"
    elif any(kind in types for kind in OF_THE_TOY) and rng.random() < 0.85:
        home = "toy"
    builder = Builder(rng, known, home)
    builder.build(chosen, chained)
    return Case(number, home, tuple(chosen), builder.prompt, tuple(builder.told))
