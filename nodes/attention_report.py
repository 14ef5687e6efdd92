"""Record Attention and Attention Report: how much the picture attends to its references."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patches.attention_record import AttentionRecord, RecordAttention, plot, table
from ..patches.engine import add_edit
from ..patches.sites import attention_sites
from ..patches.window import Window
from .types import CATEGORY, AttentionRecordType


class RecordAttentionNode(io.ComfyNode):
    """Patches a MODEL so that its next runs are recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRecordAttention",
            display_name="Record Attention",
            category=CATEGORY,
            description="Records, while the model samples, how much each layer attends to the references. Slows "
            "sampling; leave it out when no report is wanted. Changes nothing in the picture.",
            inputs=[io.Model.Input("model", tooltip="A model with Recycled Self-Attention before or after this node.")],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The recorded model, for the sampler."),
                AttentionRecordType.Output(display_name="record", tooltip="For Attention Report."),
            ],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        sites = frozenset(site for site in attention_sites(model) if site.kind == "self")
        record = AttentionRecord()
        return io.NodeOutput(add_edit(model, RecordAttention(sites, Window(), record)), record)


class AttentionReportNode(io.ComfyNode):
    """Shows what Record Attention recorded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesAttentionReport",
            display_name="Attention Report",
            category=CATEGORY,
            description="For the last run of a recorded model: the share of attention on the references (ASA) and how "
            "far their features are from the picture's own (SLD), by layer and step, as in AnyLogo's Figure 1.",
            inputs=[
                AttentionRecordType.Input("record", tooltip="From Record Attention."),
                io.Latent.Input("samples", tooltip="The sampler's result, so that the report is made after the run."),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="One line a layer and noise level, as CSV."),
                io.Image.Output(display_name="plot", tooltip="ASA and SLD as maps, layers down, steps across."),
            ],
        )

    @classmethod
    def execute(cls, record: AttentionRecord, samples: dict[str, Any]) -> io.NodeOutput:
        if not record.rows:
            raise ValueError(
                "Nothing was recorded: the sampler's model has no reference, or does not come from Record Attention. "
                "Put Recycled Self-Attention in front of it and connect its model to the sampler."
            )
        return io.NodeOutput(table(record.rows), plot(record.rows))
