"""What is written on nodes: what fits, and what does not."""

from __future__ import annotations

from typing import Any

# Inputs that are written and not connected.
WELL = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
# By the inputs' names; of others the default.
TEXTS: dict[str, tuple[str, ...]] = {
    "text": ("an emblem on grass", "an (emblem:1.2) and a red ring on grass", "emblem, emblem, emblem"),
    "phrases": ("emblem",),
    "phrase": ("emblem", "emblem", "emblem", ""),
    "concept": ("emblem",),
    "noun": ("shield",),
    "subjects": ("", "emblem"),
    "named_sites": ("middle", "output", "double.0"),
    "captions": ("a photo of a {}", ""),
    "name": ("soak_concept",),
    "filename_prefix": ("soak",),
    "resume_name": ("",),
}
# Inputs of which more takes minutes or gigabytes; 0 of a training is what suits the model.
COSTLY: dict[str, tuple[Any, ...]] = {
    "steps": (1, 2),
    "size": (64, 96),
    "width": (64, 200),
    "height": (64, 136),
    "batch_size": (1, 2),
    "fixed_point_rounds": (0, 1),
    "turns": (1, 2),
    "rank": (0, 1),
    "cache_megabytes": (0, 1, 64),
}
# Shares of a schedule, by how the inputs' names end.
WINDOWS = {"start": (0.0, 0.3), "start_percent": (0.0, 0.3), "end": (0.6, 1.0), "end_percent": (0.6, 1.0)}
_LONG = "emblem " * 700
ODD_TEXTS: tuple[Any, ...] = (
    "", " ", "\n;\n", _LONG, "nan", "((((", "))", "(emblem:nan)", "(emblem:1e40)", "(emblem:-1)", "embedding:",
    "embedding:nothing emblem", "embedding:../../x", "🐶", "ÉMBLEM", "\x00", "\u202eemblem", "emblem#0", "emblem#-1",
    "emblem#99999999999999999999", "#", "../../outside", "/outside", "CON", "a/b\\c", "%date%", "{emblem|ring}",
    "<lora:x:1>", "{}", "{noun}", "a {} and {} and {0}", "output.99", "double.0-99999999", "-1", "1-", ",,,",
    "emblem;ring;emblem", "&eacute;mblem", "x" * 300, "a.safetensors", 7, None, True, {}, 1.5,
)  # fmt: skip
# Of choices and switches.
ODD_WIDGETS: tuple[Any, ...] = ("nothing of the kind", "", " ", 0, -1, 1e9, None, "false", "../../x", {}, True, "0")
# Of numbers, besides those around the bounds.
ODD_NUMBERS: tuple[Any, ...] = (
    "nan", "inf", "-inf", "", "three", None, True, 0, -0.0, 0.5, -1, 1e308, -1e308, 2**63, -(2**63) - 1, 2**200,
    1e-320, "1e3", " 1 ", "0x10", {}, float("nan"), float("inf"),
)  # fmt: skip
