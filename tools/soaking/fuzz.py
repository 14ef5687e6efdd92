"""Generated cases, and after each the plain picture of the same model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hosting.errors import ServerError, WorkflowError

from .cases import Case, case_of
from .homes import HOMES, home_nodes
from .served import Held, Soaked, Told
from .verdicts import FAULT, Verdict, judged

# How many cases lie between two looks at what the process holds.
_LOOK = 50


@dataclass
class Tally:
    """What became of the cases: how often each verdict, of each node, what was at fault, and what the process held."""

    verdicts: Counter[str] = field(default_factory=Counter)
    nodes: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[Case, Verdict]] = field(default_factory=list)
    held: list[tuple[int, Held]] = field(default_factory=list)


def fuzz(served: Soaked, numbers: Iterable[int], seed: int = 0, told: Told = lambda _: None) -> Tally:
    """Runs the cases of these numbers. `told` hears of each."""
    # Anew: files may have come since the server was asked.
    known = served.server.get("/object_info")
    tally = Tally()

    def picture(home: str) -> str:
        return served.plain(*home_nodes(home))

    plain = {home: picture(home) for home in HOMES}
    files = served.kept_files()
    tally.held.append((0, served.held()))
    for done, number in enumerate(numbers, 1):
        case = case_of(seed, number, known)
        verdict = judged(served, case, known)
        # A node may have been given another model, which is looked at with the others now and then.
        for home in HOMES if done % _LOOK == 0 else (case.home,):
            if changed := _changed(picture, home, plain[home]):
                verdict = Verdict(FAULT, f"the next plain picture of {home} {changed}; {verdict.why}")
        tally.verdicts[verdict.what] += 1
        tally.nodes.update(set(case.nodes))
        if verdict.what == FAULT:
            tally.faults.append((case, verdict))
        told(f"{verdict.what}: {case}\n    {verdict.why}")
        if done % _LOOK == 0:
            tally.held.append((done, served.held()))
    new = {name for name in served.kept_files().keys() - files.keys() if not _saved(name)}
    if new:
        told(f"new files: {', '.join(sorted(new))}")
    return tally


def _changed(picture: Callable[[str], str], home: str, plain: str) -> str:
    """What became of the next plain picture of a model; nothing where it is the same."""
    try:
        return "" if picture(home) == plain else "is another"
    except (WorkflowError, ServerError) as error:
        return f"did not come ({error})"


def _saved(name: str) -> bool:
    """Whether a training left it, which says so."""
    return name.startswith("models/embeddings")


def report(tally: Tally) -> str:
    """The numbers of a run in lines."""
    lines = [f"{sum(tally.verdicts.values())} cases over {len(tally.nodes)} nodes:"]
    lines += [f"  {what}: {count}" for what, count in tally.verdicts.most_common()]
    lines += [f"  after {done} cases {held}" for done, held in tally.held]
    lines += [f"FAULT in {case}\n    {verdict.why}" for case, verdict in tally.faults]
    return "\n".join(lines)


def keep(tally: Tally, folder: Path) -> None:
    """Writes the workflow of each case that was at fault, in API format."""
    for case, _ in tally.faults:
        folder.mkdir(exist_ok=True)
        (folder / f"case_{case.number}.json").write_text(json.dumps(case.prompt, indent=1), encoding="utf-8")
