"""Values for inputs that are written and not connected."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .values import COSTLY, ODD_NUMBERS, ODD_TEXTS, ODD_WIDGETS, TEXTS, WELL, WINDOWS


def is_widget(type_: Any) -> bool:
    """Whether an input of a type is written and not connected."""
    return isinstance(type_, list) or type_ in WELL


def widget(
    rng: random.Random, name: str, type_: Any, options: dict[str, Any], depth: int, outputs: Sequence[str] = ()
) -> Any:
    """A value that the page would let somebody choose, of files one that the node can load."""
    choices = type_ if isinstance(type_, list) else options.get("options", [])
    if choices:
        good = [choice for choice in choices if any(_file_of(choice) in output for output in outputs)]
        if good or (depth == 0 and rng.random() < 0.4) or "default" not in options:
            return rng.choice(good or choices)
    if name in TEXTS:
        return rng.choice(TEXTS[name])
    if name in COSTLY:
        return rng.choice(COSTLY[name])
    for end, share in WINDOWS.items():
        if name.endswith(end) and depth == 0:
            return round(rng.uniform(*share), 2)
    default, least, most = options.get("default", ""), options.get("min"), options.get("max")
    if type_ == "BOOLEAN":
        return rng.random() < 0.5
    if type_ not in ("INT", "FLOAT") or depth > 0 or least is None or most is None or rng.random() < 0.4:
        return default
    return rng.randint(least, most) if type_ == "INT" else rng.uniform(least, most)


def odd_widget(rng: random.Random, name: str, type_: Any, options: dict[str, Any]) -> Any:
    """A value at a bound, beyond it, or of another kind."""
    if type_ == "STRING":
        return rng.choice(ODD_TEXTS)
    if type_ not in ("INT", "FLOAT"):
        # The host refuses what is not among the choices.
        choices = type_ if isinstance(type_, list) else options.get("options", [True, False])
        return rng.choice(choices if choices and rng.random() < 0.9 else ODD_WIDGETS)
    least, most, step = options.get("min", 0), options.get("max", 1), options.get("step", 1)
    odd = [least - step, most + step, *ODD_NUMBERS]
    if name in COSTLY:
        return rng.choice([value for value in odd if not _within(value, type_, least, most)])
    # What the host itself refuses says nothing of the pack.
    taken = [least, most, *(value for value in ODD_NUMBERS if _passes(value, type_, least, most))]
    return rng.choice(odd if rng.random() < 0.1 else taken)


def _file_of(choice: Any) -> str:
    """What kind of file it is, as an output's type says it, for one that is whole."""
    begins, _, kind = str(choice).rpartition("/")[2].partition("-")
    return kind.partition(".")[0].upper() if begins == "soak" else str(choice)


def _within(value: Any, type_: str, least: float, most: float) -> bool:
    """Whether the host takes a value for a number between two."""
    try:
        return least <= (int if type_ == "INT" else float)(value) <= most
    except (TypeError, ValueError, OverflowError):
        return False


def _passes(value: Any, type_: str, least: float, most: float) -> bool:
    """Whether the host finds nothing wrong with a value, as it does not with one that is no number."""
    return _within(value, type_, least, most) or (type_ == "FLOAT" and str(value) == "nan")
