"""Lays a workflow out to be read: titled groups from left to right, in each nodes go down and right along the links, so
that the whole is as readable as it can be where all of it is in sight. Links pass between nodes, not behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
_INPUTS = {
    *("CheckpointLoaderSimple", "LoraLoader", "LoraLoaderModelOnly", "LoadImage", "LoadImageMask", "CLIPTextEncode"),
    *(
        "EmptyLatentImage",
        "EmptySD3LatentImage",
        "PrimitiveInt",
        "PrimitiveStringMultiline",
        "SubjectPatchesEncodePrompt",
    ),
    *("SubjectPatchesAuxiliaryPrompt", "BasicScheduler", "KSamplerSelect", "RandomNoise", "UNETLoader", "VAELoader"),
    *("CLIPLoader", "DualCLIPLoader", "BatchImagesNode", "ImageScale", "FluxGuidance"),
    *("ModelSamplingAuraFlow", "ConditioningZeroOut"),
    *("CLIPVisionLoader", "StyleModelLoader", "ModelSamplingFlux", "SubjectPatchesLoadAnyStory"),
    *("SubjectPatchesLoadSubjectEncoder", "SubjectPatchesLoadSemanticInjection"),
}
_GENERATING = {
    *("KSampler", "SamplerCustom", "SamplerCustomAdvanced", "CFGGuider", "DisableNoise", "VAEDecode"),
    *("SubjectPatchesStepBlendedGuider", "SubjectPatchesSelfRecurrence", "BasicGuider"),
}
_COMPARING = {"SaveImage", "PreviewImage", "PreviewAny", "SubjectPatchesAttentionInspector"}
_PICTURES = {"SaveImage", "PreviewImage", "LoadImage", "LoadImageMask"}
# Room for a picture, so that a node need not grow when it gets one.
_PICTURE = (300.0, 340.0)
_TITLE = 30.0
# Between nodes of a column, with room for the pack's badge; between columns, wide enough for the links' curves.
_GAP, _COLUMN_GAP = 30.0, 80.0
_BETWEEN_GROUPS = 40.0
_PADDING = 40.0
_HEAD = 70.0
_HEIGHTS = range(600, 1501, 50)
_NOTE_WIDTH, _BANNER_WIDTH = 400.0, 1000.0
# A note beside the graph is read first; one above it makes the graph larger on the screen. That has to be worth it.
_WORTH = 1.06


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


def arrange(workflow: Workflow, sizes: Mapping[int, Sequence[float]]) -> Workflow:
    """The workflow with its nodes in groups, none over another, beside or below its note.

    Args:
        workflow: in UI format. A node that lies in a group stays in that group; the others go where their kind belongs.
        sizes: the least width and height of each node by its number, as the page computes them.
    """
    members = _members(workflow)
    beside = max(_ways(workflow, members, sizes, above=False), key=lambda way: way.zoom)
    above = max(_ways(workflow, members, sizes, above=True), key=lambda way: way.zoom)
    best = above if above.zoom > _WORTH * beside.zoom else beside
    extra = {key: value for key, value in (workflow.get("extra") or {}).items() if key not in WIRES}
    placed = {node["id"]: node for node in (*best.nodes, *best.note)}
    nodes = [placed[node["id"]] for node in workflow["nodes"]]
    return workflow | {"nodes": nodes, "groups": best.groups, "extra": extra | best.wired.saved()}


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
    workflow: Workflow, members: Mapping[str, list[int]], sizes: Mapping[int, Sequence[float]], above: bool
) -> Iterator[_Laid]:
    for tallest in _HEIGHTS:
        nodes = {node["id"]: dict(node) for node in workflow["nodes"]}
        notes = [node for node in nodes.values() if node["type"] == NOTE]
        left = top = 0.0
        for note in notes:
            width = _BANNER_WIDTH if above else _NOTE_WIDTH
            note["pos"], note["size"] = [0.0, _TITLE], [width, _note_height(note, width)]
            left, top = (0.0, _height(note)) if above else (width + _BETWEEN_GROUPS, 0.0)
        columns: list[list[Node]] = []
        frames = []
        for numbers in members.values():
            mine = _columns([nodes[number] for number in numbers], workflow["links"], sizes, tallest)
            right, bottom = _place(mine, left + _PADDING, top + _HEAD + _TITLE)
            frames.append([left, top, right + _PADDING - left, bottom + _PADDING - top])
            columns += mine
            left = right + _PADDING + _BETWEEN_GROUPS
        wired = wire(columns, workflow["links"])
        for node in (node for column in columns for node in column):
            node["pos"][1] += wired.height
        height = max(frame[3] for frame in frames) + wired.height
        groups = [
            {"id": number, "title": title, "bounding": [*frame[:3], height], "color": _colour(title), "flags": {}}
            for number, (title, frame) in enumerate(zip(members, frames, strict=True), start=1)
        ]
        bottom = max([top + height, *(note["pos"][1] + note["size"][1] for note in notes)])
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
    depth: dict[int, int] = {}

    def depth_of(number: int) -> int:
        if number not in depth:
            depth[number] = 1 + max((depth_of(each) for each in before[number]), default=-1)
        return depth[number]

    columns: list[list[Node]] = [[]]
    for node in sorted(nodes, key=lambda node: (depth_of(node["id"]), *_reading_order(node))):
        node["size"] = _size(node, sizes.get(node["id"], (0.0, 0.0)))
        if columns[-1] and sum(map(_height, (*columns[-1], node))) > tallest:
            columns.append([])
        columns[-1].append(node)
    for column in columns:
        width = max(node["size"][0] for node in column)
        for node in column:
            node["size"][0] = width
    return columns


def _reading_order(node: Node) -> tuple[bool, int]:
    # What everything else hangs on comes first.
    return node["type"] not in ("CheckpointLoaderSimple", "UNETLoader"), node["id"]


def _size(node: Node, least: Sequence[float]) -> list[float]:
    width, height = max(float(least[0]), 270.0, 60.0 + 8.0 * len(node.get("title") or "")), float(least[1])
    if node["type"] in _PICTURES:
        width, height = max(width, _PICTURE[0]), max(height, _PICTURE[1])
    if any(isinstance(value, str) and ("\n" in value or len(value) > 30) for value in node.get("widgets_values") or ()):
        width = max(width, 400.0)
    return [math.ceil(width), math.ceil(height)]


def _height(node: Node) -> float:
    return node["size"][1] + _TITLE + _GAP


def _place(columns: list[list[Node]], left: float, top: float) -> tuple[float, float]:
    """Puts the columns side by side from `left` and `top`; gives their right and lower edge."""
    bottom = top
    for column in columns:
        below = top
        for node in column:
            node["pos"] = [left, below]
            below += _height(node)
        bottom = max(bottom, below - _TITLE - _GAP)
        left += max(node["size"][0] for node in column) + _COLUMN_GAP
    return left - _COLUMN_GAP, bottom


def _note_height(note: Node, width: float) -> float:
    text = "".join(note.get("widgets_values") or ())
    lines = sum(1 + len(line) // int(width / 8.5) for line in text.splitlines())
    return 50.0 + 21.0 * lines
