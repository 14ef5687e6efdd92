"""Whose the files of a concept's name are: of which training, and of which node of a workflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..patches.parts.graph import Place, text_of
from .concept_inputs import told

if TYPE_CHECKING:
    from ..training.concept_files import ConceptFiles


def files_state(inputs: Mapping[str, Sequence[Any]]) -> Any:
    """Stands for a concept's files, by what is typed on Train ICO Concept, for `fingerprint_inputs`: they belong to
    what the node gives. While they are those of a training with these settings, it is their state on the disk; without
    them, or with those of another training, a value that equals nothing, so that the node runs again."""
    from ..training.concept_files import ConceptFiles

    given = {name: values[0] for name, values in inputs.items() if values and values[0] is not None}
    try:
        files = ConceptFiles(str(given.get("name", "")).strip())
        about = files.about()
        if about is not None and all(about.get(name) == value for name, value in told(given).items()):
            return files.state()
    except (ValueError, OSError):
        # For the node to say when it runs.
        pass
    return float("nan")


def check_name(name: str, place: Place) -> None:
    """Raises ValueError when another node of the workflow trains another concept of this name."""
    workflow = place.workflow
    own = workflow[place.node]
    for number, node in workflow.items():
        if number == place.node or node["class_type"] != own["class_type"] or node["inputs"] == own["inputs"]:
            continue
        theirs, mine = node["inputs"].get("name"), own["inputs"].get("name")
        text = text_of(workflow, theirs)
        # A file system may not tell letter case apart.
        if theirs == mine or (text is not None and text.strip().casefold() == name.casefold()):
            raise ValueError(
                f"The nodes {place.node} and {number} both train a concept of the name '{name}', and one would write "
                "over the other's files; give each a name of its own."
            )


def check_unwritten(files: ConceptFiles, place: Place) -> None:
    """Raises ValueError when another node has written a concept of this name in the run."""
    if files.made_in() == place.run:
        raise ValueError(
            f"Another Train ICO Concept has just written the concept '{files.name}' in this run; give one of the two "
            "another name."
        )
