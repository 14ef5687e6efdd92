"""Lays a workflow out to be read: titled groups from left to right, in each nodes go down and right along the links."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# A workflow and a node of it in UI format.
Workflow = dict[str, Any]
Node = dict[str, Any]

INPUT, SUBJECT, GENERATE, COMPARE = "Input", "Subject", "Generate", "Compare"
GROUPS = (INPUT, SUBJECT, GENERATE, COMPARE)
NOTE = "MarkdownNote"
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
_GAP = 30.0
_BETWEEN_GROUPS = 90.0
_PADDING = 30.0
# Readable where the whole workflow is in sight.
_FONT = 48
_HEAD = 80.0
_TALLEST = 1250.0
_NOTE_WIDTH = 420.0


def arrange(workflow: Workflow, sizes: Mapping[int, Sequence[float]]) -> Workflow:
    """The workflow with its nodes in groups, none over another, beside its note.

    Args:
        workflow: in UI format. A node that lies in a group stays in that group; the others go where their kind belongs.
        sizes: the least width and height of each node by its number, as the page computes them.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    members = _members(workflow)
    left = 0.0
    notes = [node for node in nodes.values() if node["type"] == NOTE]
    for note in notes:
        note["pos"], note["size"] = [0.0, _HEAD], [_NOTE_WIDTH, _note_height(note)]
        left = _NOTE_WIDTH + _BETWEEN_GROUPS
    groups = []
    for title, numbers in members.items():
        columns = _columns([nodes[number] for number in numbers], workflow["links"], sizes)
        width, height = _place(columns, left + _PADDING)
        colour = _COLOURS.get(title, _COLOURS[SUBJECT])
        bounds = [left, 0.0, width + 2 * _PADDING, height + _PADDING]
        groups.append(
            {
                "id": len(groups) + 1,
                "title": title,
                "bounding": bounds,
                "color": colour,
                "font_size": _FONT,
                "flags": {},
            }
        )
        left += width + 2 * _PADDING + _BETWEEN_GROUPS
    return workflow | {"groups": groups}


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


def _columns(
    nodes: list[Node], links: Sequence[Sequence[Any]], sizes: Mapping[int, Sequence[float]]
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
        if columns[-1] and sum(_height(each) for each in (*columns[-1], node)) > _TALLEST:
            columns.append([])
        columns[-1].append(node)
    return columns


def _reading_order(node: Node) -> tuple[bool, int]:
    # What everything else hangs on comes first.
    return node["type"] != "CheckpointLoaderSimple", node["id"]


def _size(node: Node, least: Sequence[float]) -> list[float]:
    width, height = max(float(least[0]), 270.0), float(least[1])
    if node["type"] in _PICTURES:
        width, height = max(width, _PICTURE[0]), max(height, _PICTURE[1])
    if any(isinstance(value, str) and ("\n" in value or len(value) > 30) for value in node.get("widgets_values") or ()):
        width = max(width, 400.0)
    return [math.ceil(width), math.ceil(height)]


def _height(node: Node) -> float:
    return node["size"][1] + _TITLE + _GAP


def _place(columns: list[list[Node]], left: float) -> tuple[float, float]:
    """Puts the columns side by side from `left`; gives their width and the height from a group's upper edge."""
    start, tallest = left, 0.0
    for column in columns:
        top = _HEAD + _TITLE
        for node in column:
            node["pos"] = [left, top]
            top += _height(node)
        tallest = max(tallest, top - _TITLE - _GAP)
        left += max(node["size"][0] for node in column) + 2 * _GAP
    return left - 2 * _GAP - start, tallest


def _note_height(note: Node) -> float:
    text = "".join(note.get("widgets_values") or ())
    lines = sum(1 + len(line) // 48 for line in text.splitlines())
    return 60.0 + 24.0 * lines
