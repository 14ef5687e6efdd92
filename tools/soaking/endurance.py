"""All workflows in turn on one server, and two clients at once."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from hosting.client import ApiPrompt

from .served import MEGABYTE, Held, Soaked, Told
from .workflows import again


@dataclass
class Endured:
    """What many runs gave: `resident` is memory in bytes after each, `held` what the process held after each round of
    all workflows, `faults` what was not as it should be, in sentences."""

    resident: list[int] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def endured(served: Soaked, prompts: Mapping[str, ApiPrompt], runs: int, told: Told) -> Endured:
    """Queues the workflows in turn, in another order each round; a round ends with the same plain picture."""
    first: dict[str, dict[str, str]] = {}
    result, plain, files = Endured(), served.settled(), {}
    for number, (round_, name) in enumerate(_in_turn(list(prompts), runs), 1):
        pictures = served.saved(again(prompts[name], number))
        if not same(first.setdefault(name, pictures), pictures):
            result.faults.append(f"{name} gave another picture in run {number}")
        result.resident.append(served.resident())
        told(f"run {number}: {name}, {result.resident[-1] / MEGABYTE:.0f} MB")
        if number % len(prompts) and number < runs:
            continue
        if served.settled() != plain:
            result.faults.append(f"the plain picture after run {number} is another")
        result.held.append(served.held())
        told(f"round {round_}: {result.held[-1]}")
        if number % len(prompts):
            break
        there = served.kept_files()
        if files and there != files:
            changed = sorted(name for name in there.keys() | files.keys() if there.get(name) != files.get(name))
            result.faults.append(f"round {round_} left or changed {', '.join(changed)}")
        files = there
    result.faults += growth(result.held)
    return result


def same(first: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a workflow gave the same pictures twice: those that a sampler made, which both times it had to. Of others
    the host says nothing where it has them in its cache."""
    both = first.keys() & other.keys()
    return bool(both) and all(first[node] == other[node] for node in both)


def growth(held: list[Held]) -> list[str]:
    """What is more after the last of several rounds than after the first, in sentences."""
    if len(held) < 2:
        return []
    early, late = held[0], held[-1]
    faults = []
    for name in ("hooks", "runs", "tensors", "bytes"):
        if getattr(late, name) > getattr(early, name):
            faults.append(f"{name}: {getattr(early, name)} after the first round, {getattr(late, name)} after the last")
    return faults


def together(served: Soaked, prompts: Mapping[str, ApiPrompt], told: Told) -> list[str]:
    """Two clients with the workflows in opposite orders, each with a socket of its own: the pictures that do not come
    as they come to one client alone."""
    names = list(prompts)
    alone = {name: served.saved(again(prompts[name], 0)) for name in names}

    def client(number: int) -> list[str]:
        order = names if number == 1 else names[::-1]
        shown = {name: served.saved(again(prompts[name], number)) for name in order}
        told(f"client {number} has its {len(shown)} pictures")
        changed = [name for name in names if not same(shown[name], alone[name])]
        return [f"{name} of client {number} is another than alone" for name in changed]

    with ThreadPoolExecutor(2) as clients:
        return [fault for found in clients.map(client, (1, 2)) for fault in found]


def _in_turn(names: list[str], runs: int) -> Iterator[tuple[int, str]]:
    rng = random.Random(0)  # noqa: S311, nothing is to be kept secret
    for number in range(runs):
        if number and number % len(names) == 0:
            rng.shuffle(names)
        yield number // len(names) + 1, names[number % len(names)]
