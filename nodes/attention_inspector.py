"""Record Attention and Attention Inspector: what happened inside the attention layers, for every mechanism."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from comfy_api.latest import io

from ..patches.engine.engine import add_edit
from ..patches.families import attention_sites
from ..patches.parts.graph import Place, before, here, signature
from ..patches.parts.prompt import split_phrases
from ..patches.parts.sites import sites_named
from ..patches.parts.window import Window
from ..patches.pictures.attention_pictures import (
    BY_LAYER,
    BY_STEP,
    Selection,
    by_shown,
    draw_sheets,
    mean_map,
    overlay,
    plot,
)
from ..patches.pictures.attention_pictures import sheets as sheets_of
from ..patches.pictures.attention_record import (
    CROSS_ATTENTION,
    MOST_RUNS,
    AttentionRecord,
    AttentionRuns,
    RecordAttention,
    table,
)
from .checks import check_choice, check_number, pictures_in
from .inputs import ADVANCED, model_input
from .types import INSPECT, AttentionRecordType

ALL = "all"
KINDS = (
    CROSS_ATTENTION,
    "routing map",
    "aggregation mask",
    "blend mask",
    "blend mask, stage by stage",
    "layout region",
    ALL,
)
MOST_STEPS = 10000


class RecordAttentionNode(io.ComfyNode):
    """Patches a MODEL so that its next runs are recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRecordAttention",
            display_name="Record Attention",
            category=INSPECT,
            description="Records, while the model samples, what its attention layers look at, for Attention Inspector. "
            "Slows sampling; leave it out when nothing is to be inspected. Changes nothing in the picture.",
            search_aliases=["attention maps", "daam", "heatmap", "debug", "inspect"],
            inputs=[
                model_input(),
                io.String.Input(
                    "phrases",
                    multiline=True,
                    default="",
                    placeholder="one phrase a line; empty: all",
                    tooltip="The phrases whose cross-attention maps to record, one a line. Empty: all that the prompt "
                    "knows. The prompt must come from Encode Prompt with Subjects.",
                ),
                io.Int.Input(
                    "picture",
                    default=1,
                    min=1,
                    max=4096,
                    **ADVANCED,
                    tooltip="Which picture of the batch to record, 1 is the first.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The recorded model, for the sampler."),
                AttentionRecordType.Output(display_name="record", tooltip="For Attention Inspector."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, phrases: str = "", picture: int = 1) -> io.NodeOutput:
        if picture < 1:
            raise ValueError(f"The picture is number {picture}; the first one of a batch is 1.")
        runs = AttentionRuns(attention_sites(model), picture - 1)
        edit = RecordAttention(frozenset(runs.sites), Window(), runs, split_phrases(phrases), _this_run)
        return io.NodeOutput(add_edit(model, edit), runs)


def _this_run() -> Hashable:
    """What stands for the run that begins: the sampler's node with all that it depends on, and which of a list."""
    place = here()
    return None if place is None else (signature(place.workflow, place.node), place.element)


def _run_of(runs: AttentionRuns) -> AttentionRecord:
    """The record of the run that the picture at the inspector is from: that of the nearest node before it that a run
    stands for, whenever it ran. Raises ValueError when that run is not kept, or recorded nothing."""
    place = here()
    record = runs.last if place is None else _before(runs, place)
    if all(each.empty for each in runs.kept.values()) or (record is not None and record.empty):
        raise ValueError(
            "Nothing was recorded: connect the model of Record Attention to the sampler, and give this node the "
            "picture of that run."
        )
    if record is None:
        raise ValueError(
            f"The run that made this picture is not among the last {MOST_RUNS} that were recorded, or its sampler's "
            "model is not the recorded one; change the sampler's seed and queue again, with the model of Record "
            "Attention."
        )
    return record


def _before(runs: AttentionRuns, place: Place) -> AttentionRecord | None:
    for node in before(place.workflow, place.node, ("image",)):
        given = signature(place.workflow, node)
        # A list that is shorter goes on with its last element, as the host has it.
        elements = [run[1] for run in runs.kept if run is not None and run[0] == given and run[1] <= place.element]
        if elements:
            return runs.kept[given, max(elements)]
    # A node that another one made while the workflow ran has no place in it.
    return runs.kept.get(None)


class AttentionInspectorNode(io.ComfyNode):
    """Shows what Record Attention recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesAttentionInspector",
            display_name="Attention Inspector",
            category=INSPECT,
            description="Of the run that made a picture: the attention maps of phrases and tokens, the routes, masks "
            "and regions that the nodes of this pack used, and how much the layers looked at references.",
            search_aliases=["attention maps", "daam", "heatmap", "debug", "ASA", "SLD", "report"],
            inputs=[
                AttentionRecordType.Input("record", tooltip="From Record Attention."),
                io.Image.Input(
                    "image",
                    tooltip="The decoded result of the recorded run: maps are laid over it, and it makes this node "
                    "wait for the run. Of a batch, the picture that was recorded, or else the last.",
                ),
                io.Combo.Input(
                    "show",
                    options=list(KINDS),
                    default=CROSS_ATTENTION,
                    tooltip="What to show: attention maps of the prompt's phrases, or what a node decided: Routed "
                    "Reference Attention's routing maps, Dual-Branch Integration's aggregation masks, Multi-Source "
                    "Attention Swap's blend masks, Layout Bias's regions. 'all' puts all that was recorded below one "
                    "another.",
                ),
                io.Combo.Input(
                    "arrange",
                    options=[BY_STEP, BY_LAYER],
                    default=BY_STEP,
                    tooltip="A row for each phrase or subject, layers averaged; or for each of them a block with a "
                    "row for each layer. Steps go across.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    **ADVANCED,
                    tooltip="Only these layers: blocks in the host's words, for example: middle, output.3, output.4.0. "
                    "Empty: all.",
                ),
                io.Int.Input(
                    "first_step",
                    default=1,
                    min=1,
                    max=MOST_STEPS,
                    **ADVANCED,
                    tooltip="The first step to show, from 1.",
                ),
                io.Int.Input(
                    "last_step",
                    default=MOST_STEPS,
                    min=1,
                    max=MOST_STEPS,
                    **ADVANCED,
                    tooltip="The last step to show.",
                ),
                io.Float.Input(
                    "opacity",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    **ADVANCED,
                    tooltip="How much a map covers the picture. 1 shows the map alone.",
                ),
                io.String.Input(
                    "subjects",
                    multiline=True,
                    default="",
                    placeholder="one a line; empty: all",
                    tooltip="Only what is labelled with these words, one phrase or subject a line.",
                ),
                io.Boolean.Input(
                    "tokens",
                    default=False,
                    **ADVANCED,
                    tooltip="Also show each token of a phrase by itself.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="The maps in a grid, with titles."),
                io.Image.Output(
                    display_name="maps",
                    tooltip="One picture for each phrase or subject: the mean over the chosen layers and steps.",
                ),
                io.String.Output(
                    display_name="table", tooltip="ASA and SLD of references: one line a layer and noise level, as CSV."
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="ASA, the share of attention on references, and SLD, how far their features are, as maps: "
                    "layers down, steps across.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        record: AttentionRuns,
        image: Any,
        show: str = CROSS_ATTENTION,
        arrange: str = BY_STEP,
        layers: str = "",
        first_step: int = 1,
        last_step: int = MOST_STEPS,
        opacity: float = 0.7,
        subjects: str = "",
        tokens: bool = False,
    ) -> io.NodeOutput:
        pictures = pictures_in("image", image)
        check_choice("show", show, KINDS)
        check_choice("arrange", arrange, (BY_STEP, BY_LAYER))
        check_number("opacity", opacity, 0.0, 1.0)
        if not 1 <= first_step <= last_step:
            raise ValueError(f"The steps go from {first_step} to {last_step}; give the first one first, from 1.")
        record = _run_of(record)
        chosen = sites_named(record.sites, layers) if layers.strip() else None
        selection = Selection(chosen, first_step, last_step, tokens, split_phrases(subjects))
        kinds = record.kinds if show == ALL else (show,)
        picked = {kind: selection.of(record, kind) for kind in kinds}
        found = [maps for maps in picked.values() if maps]
        if not found and (show != ALL or record.maps):
            raise ValueError(_nothing_of(record, show))
        picture = pictures[min(record.picture, len(pictures) - 1), ..., :3].float().cpu()
        made = [sheet for maps in found for sheet in sheets_of(maps, record.sigmas, arrange)]
        means = [mean_map(each) for maps in found for each in by_shown(maps).values()]
        # A run that no prompt or node said anything of has its plot alone.
        grid = draw_sheets(made, picture, opacity) if made else picture[None]
        maps = torch.stack([overlay(each, picture, opacity) for each in means] or [picture])
        return io.NodeOutput(grid, maps, table(record.rows), plot(record.rows))


def _nothing_of(record: AttentionRecord, show: str) -> str:
    if show not in record.kinds and show == CROSS_ATTENTION:
        return (
            "The prompt of the recorded run knows none of the phrases, so there are no cross-attention maps; make it "
            "with Encode Prompt with Subjects, with phrases."
        )
    if show not in record.kinds and show != ALL:
        there = ", ".join(record.kinds) or "none"
        return f"The recorded run has nothing called '{show}'; choose one of those it has ({there})."
    labels = ", ".join(dict.fromkeys(shown.label for shown, _, _ in record.maps if show in (ALL, shown.kind)))
    return (
        f"None of the recorded maps is of these layers, steps and subjects; the run has {len(record.sigmas)} steps and "
        f"maps of {labels}: choose among those, or leave the choice empty."
    )
