"""Lays a workflow out to be read: titled groups from left to right, in each nodes go down and right along the links, so
that the whole is as readable as it can be where all of it is in sight. Links pass between nodes, not behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from .wiring import WIRES, Wired, wire

# A workflow and a node of it in UI format.
Workflow = dict[str, Any]
Node = dict[str, Any]

INPUT, SUBJECT, GENERATE, COMPARE = "Input", "Subject", "Generate", "Compare"
GROUPS = (INPUT, SUBJECT, GENERATE, COMPARE)
NOTE = "MarkdownNote"
# What a page of 1920 x 1080 shows beside its bars.
SCREEN = (1760.0, 840.0)
_COLOURS = {INPUT: "#3f789e", SUBJECT: "#8A8", GENERATE: "#b58b2a", COMPARE: "#a1309b"}
_LOADERS = {
    *("CheckpointLoaderSimple", "UNETLoader", "CLIPLoader", "DualCLIPLoader", "VAELoader", "CLIPVisionLoader"),
    *("StyleModelLoader", "SubjectPatchesLoadAnyStory", "SubjectPatchesLoadSubjectEncoder"),
    "SubjectPatchesLoadSemanticInjection",
}
_PROMPTS = {"CLIPTextEncode", "SubjectPatchesEncodePrompt", "SubjectPatchesAuxiliaryPrompt", "ConditioningZeroOut"}
_WRITTEN = {*_PROMPTS, "StringFormat"}
_INPUTS = {
    *_LOADERS,
    *_PROMPTS,
    *("LoraLoader", "LoraLoaderModelOnly", "LoadImage", "LoadImageMask", "BatchImagesNode", "ImageScale"),
    *("EmptyLatentImage", "EmptySD3LatentImage", "PrimitiveInt", "PrimitiveStringMultiline", "BasicScheduler"),
    *("PrimitiveString", "StringFormat", "KSamplerSelect", "RandomNoise", "FluxGuidance"),
    *("ModelSamplingAuraFlow", "ModelSamplingFlux"),
}
_GENERATING = {
    *("KSampler", "SamplerCustom", "SamplerCustomAdvanced", "CFGGuider", "DisableNoise", "VAEDecode"),
    *("SubjectPatchesStepBlendedGuider", "SubjectPatchesSelfRecurrence", "BasicGuider"),
}
_COMPARING = {"SaveImage", "PreviewImage", "PreviewAny", "SubjectPatchesAttentionInspector"}
_PICTURES = {"SaveImage", "PreviewImage", "LoadImage", "LoadImageMask"}
# What they say while they run stays below their widgets.
TELLING = {"SubjectPatchesTrainConcept", "SubjectPatchesTrainResidualToken"}
TOLD = "step 300 of 900, loss 0.1234, 10:20 left"
# Room for a picture, so that a node need not grow when it gets one.
_PICTURE = (300.0, 340.0)
# How high the page makes a node's title.
TITLE = 30.0
# Between nodes of a column, with room for the pack's badge; between columns, wide enough for the links' curves.
_GAP, _COLUMN_GAP = 30.0, 80.0
_BETWEEN_GROUPS = 20.0
_PADDING = 40.0
_HEAD = 70.0
_HEIGHTS = range(600, 1501, 50)
_NOTE_WIDTH, _BANNER_WIDTH = 400.0, 1000.0
# A note beside the graph is read first, and results are looked for right of what makes them. To put one of them
# elsewhere so that the graph is larger on the screen has to be worth it.
_WORTH = 1.06
# The page leaves words away below a zoom of 0.572. A graph that is larger opens with its left part in sight.
_LEGIBLE = 0.6
# Where a workflow's upper left corner is when it opens: beside the page's bars.
_MARGINS = (80.0, 110.0)


@dataclass
class _Laid:
    """A way to lay the workflow out."""

    nodes: list[Node]
    note: list[Node]
    groups: list[dict[str, Any]]
    wired: Wired
    size: tuple[float, float] = field(default=(0.0, 0.0))

    @property
    def zoom(self) -> float:
        """How large it can be shown on a screen, at most as it is."""
        return min(1.0, *(has / needs for has, needs in zip(SCREEN, self.size, strict=True)))

    @property
    def view(self) -> float:
        """How large it is shown when it opens."""
        return round(max(self.zoom, _LEGIBLE), 3)


def arrange(workflow: Workflow, sizes: Mapping[int, Sequence[float]]) -> Workflow:
    """The workflow with its nodes in groups, none over another, beside or below its note, and the view it opens in.

    Args:
        workflow: in UI format. A node that lies in a group stays in that group; the others go where their kind belongs.
        sizes: the least width and height of each node by its number, as the page computes them.
    """
    members = _members(workflow)

    def best(*, above: bool) -> _Laid:
        found = [[*_ways(workflow, members, sizes, above=above, stacked=stacked)] for stacked in (False, True)]
        usual, *others = (max(ways, key=lambda way: way.zoom) for ways in found if ways)
        return _better(*others, usual) if others else usual

    chosen = _better(best(above=True), best(above=False))
    extra = {key: value for key, value in (workflow.get("extra") or {}).items() if key not in WIRES}
    placed = {node["id"]: node for node in (*chosen.nodes, *chosen.note)}
    nodes = [placed[node["id"]] for node in workflow["nodes"]]
    view = {"scale": chosen.view, "offset": [round(margin / chosen.view) for margin in _MARGINS]}
    return workflow | {"nodes": nodes, "groups": chosen.groups, "extra": extra | chosen.wired.saved() | {"ds": view}}


def _better(one: _Laid, usual: _Laid) -> _Laid:
    """The usual way, unless the one makes the graph so much larger on the screen that it is worth it."""
    return one if one.zoom > _WORTH * usual.zoom else usual


def group_of(node: Node) -> str:
    """The group that a node's kind belongs to."""
    if node["type"] in _INPUTS:
        return INPUT
    if node["type"] in _GENERATING:
        return GENERATE
    return COMPARE if node["type"] in _COMPARING else SUBJECT


def _members(workflow: Workflow) -> dict[str, list[int]]:
    """The numbers of each group's nodes, groups from left to right and none of them empty."""
    drawn = sorted(workflow.get("groups") or (), key=lambda group: group["bounding"][0])
    found: dict[str, list[int]] = {group["title"]: [] for group in drawn} or {title: [] for title in GROUPS}
    for node in workflow["nodes"]:
        if node["type"] == NOTE:
            continue
        inside = (group["title"] for group in drawn if _within(node["pos"], group["bounding"]))
        found.setdefault(next(inside, group_of(node)), []).append(node["id"])
    return {title: numbers for title, numbers in found.items() if numbers}


def _within(place: Sequence[float], bounds: Sequence[float]) -> bool:
    return 0 <= place[0] - bounds[0] < bounds[2] and 0 <= place[1] - bounds[1] < bounds[3]


def _ways(
    workflow: Workflow,
    members: Mapping[str, list[int]],
    sizes: Mapping[int, Sequence[float]],
    *,
    above: bool,
    stacked: bool,
) -> Iterator[_Laid]:
    """Ways for columns of several heights, with the note `above` the graph or beside it, and the last group below the
    one before it (`stacked`), where both are one column, or beside it."""
    for tallest in _HEIGHTS:
        nodes = {node["id"]: dict(node) for node in workflow["nodes"]}
        notes = [node for node in nodes.values() if node["type"] == NOTE]
        left = top = 0.0
        for note in notes:
            width = _BANNER_WIDTH if above else _NOTE_WIDTH
            note["pos"], note["size"] = [0.0, TITLE], [width, _note_height(note, width)]
            left, top = (0.0, _height(note)) if above else (width + _BETWEEN_GROUPS, 0.0)
        grouped = [
            _columns([nodes[number] for number in numbers], workflow["links"], sizes, tallest)
            for numbers in members.values()
        ]
        # Groups from left to right, some of them below others.
        stacks = [[mine] for mine in grouped]
        if stacked:
            if [len(mine) for mine in grouped[-2:]] != [1, 1]:
                continue
            _widen([*grouped[-2][0], *grouped[-1][0]])
            stacks[-2:] = [grouped[-2:]]
        columns: list[list[Node]] = []
        frames: list[list[list[float]]] = []
        for stack in stacks:
            start, framed = top, []
            for mine in stack:
                right, bottom = _place(mine, left + _PADDING, start + _HEAD + TITLE)
                framed.append([left, start, right + _PADDING - left, bottom + _PADDING - start])
                start += framed[-1][3] + _BETWEEN_GROUPS
            columns += [[node for part in parts for node in part] for parts in zip(*stack, strict=True)]
            frames.append(framed)
            left += framed[0][2] + _BETWEEN_GROUPS
        wired = wire(columns, workflow["links"])
        for node in (node for column in columns for node in column):
            node["pos"][1] += wired.height
        bottom = max(last[1] + last[3] for *_, last in frames) + wired.height
        for first, *below in frames:
            first[3] += wired.height
            for frame in below:
                frame[1] += wired.height
            last = [first, *below][-1]
            last[3] = bottom - last[1]
        groups = [
            {"id": number, "title": title, "bounding": frame, "color": _colour(title), "flags": {}}
            for number, (title, frame) in enumerate(zip(members, chain(*frames), strict=True), start=1)
        ]
        bottom = max([bottom, *(note["pos"][1] + note["size"][1] for note in notes)])
        others = [node for node in nodes.values() if node["type"] != NOTE]
        yield _Laid(others, notes, groups, wired, (left - _BETWEEN_GROUPS, bottom))


def _colour(title: str) -> str:
    return _COLOURS.get(title, _COLOURS[SUBJECT])


def _columns(
    nodes: list[Node], links: Sequence[Sequence[Any]], sizes: Mapping[int, Sequence[float]], tallest: float
) -> list[list[Node]]:
    """The nodes column by column: each below or right of those of its group that it takes something from."""
    mine = {node["id"] for node in nodes}
    before: dict[int, set[int]] = {number: set() for number in mine}
    for _, source, _, target, *_ in links:
        if source in mine and target in mine:
            before[target].add(source)
    columns: list[list[Node]] = [[]]
    placed: set[int] = set()
    left = sorted(nodes, key=_reading_order)
    while left:
        node = next((each for each in left if before[each["id"]] <= placed), left[0])
        left.remove(node)
        placed.add(node["id"])
        node["size"] = _size(node, sizes.get(node["id"], (0.0, 0.0)))
        if columns[-1] and sum(map(_height, (*columns[-1], node))) > tallest:
            columns.append([])
        columns[-1].append(node)
    for column in columns:
        _widen(column)
    return columns


def _widen(column: list[Node]) -> None:
    """Makes its nodes as wide as the widest."""
    width = max(node["size"][0] for node in column)
    for node in column:
        node["size"][0] = width


def _reading_order(node: Node) -> tuple[int, int]:
    """What everything else hangs on comes first, then what people change: pictures, nouns, prompts. A node's number
    decides between others."""
    if node["type"] in ("LoadImage", "LoadImageMask"):
        place = 1
    elif node["type"] == "PrimitiveString":
        place = 2
    elif node["type"] in _WRITTEN:
        place = 4 if "negative" in (node.get("title") or "").lower() else 3
    else:
        place = 0 if node["type"] in _LOADERS else 5
    return place, node["id"]


def _size(node: Node, least: Sequence[float]) -> list[float]:
    width, height = max(float(least[0]), 270.0, 60.0 + 8.0 * len(node.get("title") or "")), float(least[1])
    if node["type"] in _PICTURES:
        width, height = max(width, _PICTURE[0]), max(height, _PICTURE[1])
    if any(isinstance(value, str) and ("\n" in value or len(value) > 30) for value in node.get("widgets_values") or ()):
        width = max(width, 400.0)
    return [math.ceil(width), math.ceil(height)]


def _height(node: Node) -> float:
    return node["size"][1] + TITLE + _GAP


def _place(columns: list[list[Node]], left: float, top: float) -> tuple[float, float]:
    """Puts the columns side by side from `left` and `top`; gives their right and lower edge."""
    bottom = top
    for column in columns:
        below = top
        for node in column:
            node["pos"] = [left, below]
            below += _height(node)
        bottom = max(bottom, below - TITLE - _GAP)
        left += max(node["size"][0] for node in column) + _COLUMN_GAP
    return left - _COLUMN_GAP, bottom


def _note_height(note: Node, width: float) -> float:
    text = "".join(note.get("widgets_values") or ())
    lines = sum(1 + len(line) // int(width / 6.5) for line in text.splitlines())
    return 60.0 + 18.0 * lines
