"""What the nodes of a run did in it, counted as it goes, for one line each in the log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from ..parts.sites import Site
from .edit import Edit
from .streams import Stream


class Tally:
    """Counts steps and layers by the name of a node, and passes over companions with those that a cache saved."""

    def __init__(self) -> None:
        self._steps: dict[str, set[float]] = defaultdict(set)
        self._layers: dict[str, set[Site]] = defaultdict(set)
        self._streams: dict[str, set[int]] = defaultdict(set)
        self._passes: dict[int, int] = defaultdict(int)
        self._saved: dict[int, int] = defaultdict(int)

    def acts(self, edits: Iterable[Edit], sigma: float) -> None:
        """These edits are in their window at a noise level."""
        for edit in edits:
            self._steps[edit.node].add(sigma)

    def amends(self, edits: Iterable[Edit], site: Site) -> None:
        """These edits amended a call."""
        for edit in edits:
            self._layers[edit.node].add(site)

    def asks(self, edit: Edit, stream: Stream) -> None:
        """An edit takes features of a companion."""
        self._streams[edit.node].add(id(stream))

    def recorded(self, stream: Stream, saved: bool) -> None:
        """A companion's features at one noise level were needed; `saved` says that all of them were there, in its
        cache or since the level before."""
        self._passes[id(stream)] += 1
        self._saved[id(stream)] += saved

    def lines(self) -> list[str]:
        """A sentence for each node that acted: steps, layers, companions, and what the caches saved."""
        return [self._line(node) for node, layers in self._layers.items() if node and layers]

    def _line(self, node: str) -> str:
        said = [_count(len(self._steps[node]), "step"), _count(len(self._layers[node]), "layer")]
        streams = self._streams[node]
        if streams:
            passes, saved = (sum(counted[each] for each in streams) for counted in (self._passes, self._saved))
            said.append(f"{_count(len(streams), 'companion')}, {saved} of {_count(passes, 'pass')} from the cache")
        return f"{node}: {', '.join(said)}."


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{plural if number != 1 else ''}"
