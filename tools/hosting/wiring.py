"""Where links pass between nodes: a link that would run behind one goes above all of them, in a lane of its own.

The page draws a link through its reroutes, points that hang on each other; to the server they are nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Node = dict[str, Any]
Point = tuple[float, float]
# A link as a workflow has it: number, source and its slot, target and its slot, type.
Link = Sequence[Any]

WIRES = ("reroutes", "linkExtensions")
_SLOT, _FIRST = 20.0, 14.0
_TITLE = 30.0
_LANE = 16.0
# From a node's upper edge to the lowest lane: the title, the pack's badge on it, and some air.
_ABOVE = 66.0
# From which height on a curve needs a second point to stay between two columns.
_STEEP = 450.0
# How far inside a node a link may come.
_EDGE = 4.0
_MARGIN = 80.0
# How far below and beside a node a link goes around it, and the next one.
_NEAR, _LOOP, _NEXT = 8.0, 16.0, 6.0
_STEPS = 48


@dataclass
class Wired:
    """Reroutes of a workflow, and how much higher its lanes need the room above the nodes."""

    height: float = 0.0
    reroutes: list[dict[str, Any]] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)

    def saved(self) -> dict[str, Any]:
        """What a workflow's `extra` says of them."""
        links = [{"id": link, "parentId": reroute} for link, reroute in self.last.items()]
        return dict(zip(WIRES, (self.reroutes, links), strict=True)) if links else {}

    def add(self, point: Point, links: Sequence[int], parent: int | None) -> int:
        """A reroute behind `parent`; gives its number."""
        number = len(self.reroutes) + 1
        hangs = {} if parent is None else {"parentId": parent}
        self.reroutes.append({"id": number, **hangs, "pos": [*map(round, point)], "linkIds": [*links]})
        self.last |= dict.fromkeys(links, number)
        return number


@dataclass
class _Net:
    """What one output lends above the nodes: from a gutter between columns to others, each with its links."""

    start: Point
    gutter: int
    stops: dict[int, list[tuple[int, Point]]]
    lane: int = 0

    @property
    def ways(self) -> tuple[list[int], list[int]]:
        """The gutters that it stops in, in order: those ahead of where it begins, and those behind."""
        ahead = sorted(gutter for gutter in self.stops if gutter >= self.gutter)
        return ahead, sorted((gutter for gutter in self.stops if gutter < self.gutter), reverse=True)

    @property
    def ends(self) -> tuple[int, int]:
        return min(self.gutter, *self.stops), max(self.gutter, *self.stops)


def wire(columns: Sequence[Sequence[Node]], links: Sequence[Link]) -> Wired:
    """Lanes for links that would run behind nodes, which stand in columns from left to right, each from one height.

    The nodes have to be moved down by `height` of the result afterwards: the reroutes stand where they belong then.
    """
    nets = _nets(columns, links)
    _give_lanes(nets)
    wired = Wired(_LANE * max((net.lane for net in nets), default=0))
    _loop(wired, columns, links)
    lowest = columns[0][0]["pos"][1] + wired.height - _ABOVE
    places = _places(columns, nets)
    for net in nets:
        lane = lowest - net.lane * _LANE
        every = [link for stop in net.stops.values() for link, _ in stop]
        parent = None
        x = places.pop(0)
        if abs(net.start[1] + wired.height - lane) > _STEEP:
            parent = wired.add((x, net.start[1] + wired.height), every, parent)
        first = parent = wired.add((x, lane), every, parent)
        for way in net.ways:
            parent = first
            for number, gutter in enumerate(way):
                x = places.pop(0)
                on = [link for later in way[number:] for link, _ in net.stops[later]]
                parent = wired.add((x, lane), on, parent)
                for link, end in net.stops[gutter]:
                    if abs(end[1] + wired.height - lane) > _STEEP:
                        wired.add((x, end[1] + wired.height), [link], parent)
                    else:
                        wired.last[link] = parent
    return wired


def _nets(columns: Sequence[Sequence[Node]], links: Sequence[Link]) -> list[_Net]:
    place = {node["id"]: number for number, column in enumerate(columns) for node in column}
    nodes = {node["id"]: node for column in columns for node in column}
    nets: dict[tuple[int, int], _Net] = {}
    for number, source, slot, target, entry, *_ in links:
        if source not in nodes or target not in nodes or place[target] == place[source] + 1:
            continue
        if _below(nodes[source], nodes[target]):
            continue
        start, end = _output(nodes[source], slot), _input(nodes[target], entry)
        if place[target] > place[source] and _free(start, end, source, target, nodes):
            continue
        net = nets.setdefault((source, slot), _Net(start, place[source] + 1, {}))
        net.stops.setdefault(place[target], []).append((number, end))
    return [*nets.values()]


def _below(source: Node, target: Node) -> bool:
    return source["pos"][0] == target["pos"][0] and source["pos"][1] < target["pos"][1]


def _loop(wired: Wired, columns: Sequence[Sequence[Node]], links: Sequence[Link]) -> None:
    """Links to a node further down in the same column: through the gap below the one that they come from."""
    for column in columns:
        nodes = {node["id"]: node for node in column}
        outputs: dict[tuple[int, int], list[tuple[int, Point]]] = {}
        for number, source, slot, target, entry, *_ in links:
            if source in nodes and target in nodes and _below(nodes[source], nodes[target]):
                outputs.setdefault((source, slot), []).append((number, _input(nodes[target], entry)))
        inside = dict.fromkeys(nodes, 0)
        for place, ((source, _), ends) in enumerate(outputs.items()):
            (left, top), (width, height) = nodes[source]["pos"], nodes[source]["size"]
            y = top + height + _NEAR + _NEXT * inside[source] + wired.height
            inside[source] += 1
            beside = _LOOP + _NEXT * place
            every = [link for link, _ in ends]
            first = wired.add((left + width + beside, y), every, None)
            second = wired.add((left - beside, y), every, first)
            for link, end in ends:
                if end[1] + wired.height - y > _STEEP:
                    wired.add((left - beside, end[1] + wired.height), [link], second)


def _give_lanes(nets: Sequence[_Net]) -> None:
    """Short ways below, long ones above, none over another."""
    taken: list[list[tuple[int, int]]] = []
    for net in sorted(nets, key=lambda net: net.ends[1] - net.ends[0]):
        left, right = net.ends
        free = (lane for lane, held in enumerate(taken) if all(right < low or high < left for low, high in held))
        net.lane = next(free, len(taken))
        if net.lane == len(taken):
            taken.append([])
        taken[net.lane].append(net.ends)


def _places(columns: Sequence[Sequence[Node]], nets: Sequence[_Net]) -> list[float]:
    """Where between columns each net goes up and comes down, in the order in which reroutes are made."""
    edges = [(column[0]["pos"][0], column[0]["pos"][0] + column[0]["size"][0]) for column in columns]
    used = []
    for net in nets:
        ahead, behind = net.ways
        used += [net.gutter, *ahead, *behind]
    many = {gutter: used.count(gutter) for gutter in used}
    seen = dict.fromkeys(many, 0)
    found = []
    for gutter in used:
        seen[gutter] += 1
        # Beside the last column there is only the group's edge.
        left = edges[gutter - 1][1] if gutter else edges[0][0] - _MARGIN
        right = edges[gutter][0] if gutter < len(edges) else left + _MARGIN
        # In the middle of the gutter: curves need room on both sides.
        found.append(left + (right - left) * (0.3 + 0.4 * seen[gutter] / (many[gutter] + 1)))
    return found


def _free(start: Point, end: Point, source: int, target: int, nodes: dict[int, Node]) -> bool:
    boxes = [_box(node) for number, node in nodes.items() if number not in (source, target)]
    return not any(
        left < x < right and top < y < bottom for x, y in _curve(start, end) for left, top, right, bottom in boxes
    )


def _curve(start: Point, end: Point) -> Iterator[Point]:
    """Points of the line that the page draws."""
    reach = max(30.0, 0.25 * math.dist(start, end))
    for step in range(1, _STEPS):
        t = step / _STEPS
        inner = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2
        x = ((1 - t) ** 3 + inner[0]) * start[0] + inner[0] * reach + (inner[1] + t**3) * end[0] - inner[1] * reach
        yield x, ((1 - t) ** 3 + inner[0]) * start[1] + (inner[1] + t**3) * end[1]


def _box(node: Node) -> tuple[float, float, float, float]:
    (left, top), (width, height) = node["pos"], node["size"]
    return left + _EDGE, top - _TITLE + _EDGE, left + width - _EDGE, top + height - _EDGE


def _output(node: Node, slot: int) -> Point:
    return node["pos"][0] + node["size"][0], node["pos"][1] + _FIRST + _SLOT * slot


def _input(node: Node, slot: int) -> Point:
    sockets = [entry for entry in node["inputs"] if "widget" not in entry]
    entry = node["inputs"][slot]
    rows = sockets.index(entry) if entry in sockets else len(sockets) + slot
    return node["pos"][0], node["pos"][1] + _FIRST + _SLOT * rows
