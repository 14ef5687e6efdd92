"""The inputs that every training node has, and its loss output."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

# The host's own type: a dictionary with the list "loss", for its Plot Loss Graph.
LossMapType = io.Custom("LOSS_MAP")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")
STEPS_MAX = 1_000_000


def steps_input(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=STEPS_MAX, tooltip=tooltip)


def training_inputs() -> list[Any]:
    """Seed, precision, gradient checkpointing, and the name under which a training can go on."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**63 - 1,
            control_after_generate=False,
            tooltip="Fixes what is drawn in training: noise, noise levels, pictures, sentences.",
        ),
        io.Combo.Input(
            "precision",
            options=list(PRECISIONS),
            default="auto",
            advanced=True,
            tooltip="What the model computes in; what is trained is kept in fp32. 'auto' is bf16 or fp16 where the GPU "
            "has it, fp32 on a CPU.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            advanced=True,
            tooltip="Needs much less memory, and about a third more time. Changes nothing in the result.",
        ),
        io.String.Input(
            "resume_name",
            default="",
            advanced=True,
            tooltip="With a name, a training that was cancelled or whose steps were raised goes on where it stopped. "
            "Its state is kept in the output folder under training/, a few times the size of what is trained.",
        ),
    ]


def loss_output() -> Any:
    return LossMapType.Output(display_name="loss_map", tooltip="The loss of each step, for Plot Loss Graph.")
