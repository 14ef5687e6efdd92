"""Subjects of `tools/soak.py`: what is asked of the pack over a server's queue, again and again, and of odd things.

Each is a function of the host, the command's options and a folder for what is at fault; it prints what it finds and
gives the number of faults."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from hosting.location import Host


def _told(line: str) -> None:
    print(line, flush=True)


def _fuzz(host: Host, options: Namespace, output: Path) -> int:
    from .fuzz import fuzz, keep, report
    from .served import soaked

    # One model is then the same through all cases, and what was changed of it is seen.
    with soaked(host, ("--cache-lru", "200")) as served:
        tally = fuzz(served, range(options.first, options.first + options.count), options.seed, _told)
    keep(tally, output)
    _told(report(tally))
    return len(tally.faults)


def _endurance(host: Host, options: Namespace, _output: Path) -> int:
    from measuring.given import chosen

    from .endurance import endured
    from .served import soaked
    from .workflows import small_workflows

    with soaked(host) as served:
        prompts = small_workflows(served.server)
        names = chosen(options.only, prompts)
        return _listed(endured(served, {name: prompts[name] for name in names}, options.runs, _told).faults)


def _interrupts(host: Host, options: Namespace, _output: Path) -> int:
    from measuring.given import chosen

    from .flags import NAMES
    from .interrupts import interrupted
    from .served import soaked
    from .workflows import small_workflows

    with soaked(host) as served:
        names = chosen(options.only, NAMES)
        return _listed(interrupted(served, small_workflows(served.server, names), _told))


def _clients(host: Host, _options: Namespace, _output: Path) -> int:
    from .endurance import together
    from .flags import NAMES
    from .served import soaked
    from .workflows import small_workflows

    with soaked(host) as served:
        return _listed(together(served, small_workflows(served.server, NAMES), _told))


def _flags(host: Host, options: Namespace, _output: Path) -> int:
    from measuring.given import chosen

    from .flags import EXACT, HALF, NAMES, OF_A_GPU, flagged, twice
    from .served import soaked
    from .workflows import small_workflows

    there = {" ".join(flags).removeprefix("--"): flags for flags in (*EXACT, *OF_A_GPU, *HALF)}
    flags = [there[name] for name in chosen(options.only, there)]
    with soaked(host) as served:
        usual, faults = twice(served, small_workflows(served.server, NAMES))
    return _listed([*faults, *flagged(host, flags, usual, NAMES, _told)])


def _start(host: Host, _options: Namespace, _output: Path) -> int:
    from .starts import started

    return _listed(started(host, _told))


def _listed(faults: list[str]) -> int:
    for fault in faults:
        _told(f"FAULT: {fault}")
    return len(faults)


SUBJECTS: dict[str, Callable[[Host, Namespace, Path], int]] = {
    "fuzz": _fuzz,
    "soak": _endurance,
    "interrupt": _interrupts,
    "clients": _clients,
    "flags": _flags,
    "start": _start,
}
