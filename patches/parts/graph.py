"""The workflow that is being executed, as the host's queue has it: which node runs, and what stands before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

# Our nodes that say of a prompt where its phrases are, and how all of ours begin.
ENCODERS = ("SubjectPatchesEncodePrompt", "SubjectPatchesAuxiliaryPrompt")
PREFIX = "SubjectPatches"
# A workflow in API format: by their ids, the nodes with their class_type and inputs.
Workflow = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Place:
    """Where in a workflow the host is: the run of its queue, the node, and which element of a list it works on."""

    workflow: Workflow
    run: str
    node: str
    element: int = 0


def here() -> Place | None:
    """The node that is being executed; None outside of a server's queue, and in a node that another one has made."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    running, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if running is None or server is None:
        return None
    executed, _ = server.prompt_queue.get_current_queue_volatile()
    workflow = next((item[2] for item in executed if item[1] == running.prompt_id), {})
    if running.node_id not in workflow:
        return None
    return Place(workflow, running.prompt_id, running.node_id, running.list_index or 0)


def links(node: Mapping[str, Any]) -> dict[str, str]:
    """The node at each linked input."""
    return {name: value[0] for name, value in node["inputs"].items() if _is_link(value)}


def before(workflow: Workflow, node: str, names: tuple[str, ...] = ()) -> Iterator[str]:
    """All nodes that a node's inputs depend on, the nearest first; with `names`, by way of those inputs of it."""
    near = [source for name, source in links(workflow[node]).items() if not names or name in names]
    seen: set[str] = set()
    while near:
        found = [each for each in dict.fromkeys(near) if each not in seen and each in workflow]
        yield from found
        seen.update(found)
        near = [source for each in found for source in links(workflow[each]).values()]


def signature(workflow: Workflow, node: str) -> str:
    """Stands for what a node gives: its kind and inputs, and those of all nodes before it, whatever their numbers."""

    @cache
    def digest(number: str) -> str:
        each = workflow.get(number)
        if each is None:
            return number
        inputs = sorted(
            (name, (digest(value[0]), value[1]) if _is_link(value) else repr(value))
            for name, value in each["inputs"].items()
        )
        return hashlib.sha256(repr((each["class_type"], inputs)).encode()).hexdigest()

    return digest(node)


def text_of(workflow: Workflow, value: Any) -> str | None:
    """The text of an input, also where a node of a single text gives it; None where it cannot be told."""
    if isinstance(value, str):
        return value
    if not _is_link(value) or value[0] not in workflow:
        return None
    inputs = list(workflow[value[0]]["inputs"].values())
    return text_of(workflow, inputs[0]) if len(inputs) == 1 else None


def lost(names: tuple[str, ...] = ()) -> str:
    """What to add to a sentence about a prompt that says nothing of its phrases, though a node of ours encoded it:
    which nodes between that one and the node that runs made another conditioning of it. "" where that cannot be told.

    `names` are the inputs that the prompt comes by; without them any but a negative one."""
    place = here()
    if place is None:
        return ""
    ways = list(_ways(place.workflow, place.node, names))
    if not ways or any(not between for _, between in ways):
        return ""
    maker, between = ways[0]
    # The host's own nodes keep what they are given; another pack's may make a conditioning of its own.
    suspects = [each for each in between if not _is_the_hosts(place.workflow, each)] or between
    called = ", ".join(_called(place.workflow, each) for each in suspects)
    one = "" if len(suspects) == 1 else "one of "
    return (
        f" It was encoded by {_called(place.workflow, maker)}, but {one}{called} behind it makes a conditioning that "
        "says nothing of this any more: leave that node out, or let it act on another prompt."
    )


def _ways(workflow: Workflow, node: str, names: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """From a node by prompts and guiders back to each node of ours that encodes one: that node, and those of other
    packs and the host between the two."""
    for name, source in links(workflow[node]).items():
        if source not in workflow or (names and name not in names) or (not names and "negative" in name):
            continue
        kind = workflow[source]["class_type"]
        if kind in ENCODERS:
            yield source, []
        elif _gives_prompts(kind, workflow[node]["inputs"][name][1]):
            for maker, between in _ways(workflow, source, ()):
                yield maker, between if kind.startswith(PREFIX) else [*between, source]


def _gives_prompts(kind: str, output: int) -> bool:
    import nodes

    types = getattr(nodes.NODE_CLASS_MAPPINGS.get(kind), "RETURN_TYPES", ())
    return output < len(types) and str(types[output]) in ("CONDITIONING", "GUIDER", "*")


def _is_the_hosts(workflow: Workflow, node: str) -> bool:
    import nodes

    made = nodes.NODE_CLASS_MAPPINGS.get(workflow[node]["class_type"])
    return not str(getattr(made, "RELATIVE_PYTHON_MODULE", None) or "").startswith("custom_nodes")


def _called(workflow: Workflow, node: str) -> str:
    each = workflow[node]
    return f"{each.get('_meta', {}).get('title') or each['class_type']} (node {node})"


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
