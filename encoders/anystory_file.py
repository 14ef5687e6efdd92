"""What is in AnyStory's released weights for FLUX: names and shapes, as its authors' loader expects them.

The authors publish one dictionary of three: `ref`, the LoRA of the stream of references; `router`, the LoRA of the
stream of router tokens, the maps' projections and the router's embedder; `redux`, the embedder of the subjects' own
tokens. `tools/convert.py` writes them as one safetensors file, each name after its dictionary's. Nothing here needs
torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from .weights import FileForm, Shape, Shapes, check_shapes
from .weights import metadata as file_metadata

PARTS = ("ref", "router", "redux")
# What a FLUX layer has of hidden channels and a Redux model of inner ones, as multiples of its width.
_FEED_FORWARD, _REDUX = 4, 3
_BLOCK = re.compile(r"transformer\.(transformer_blocks|single_transformer_blocks)\.(\d+)\.")

PartShapes = Mapping[str, Shapes]


@dataclass(frozen=True)
class Form(FileForm):
    """The sizes that decide every name and shape of a file.

    `double` and `single` count the FLUX's blocks, `width` is that of its streams, `context` that of its prompts'
    tokens, `packed` are the channels of a latent patch and `vision` those of the vision model. The others are ranks: of
    the two LoRAs, of the maps' projections, and of the embedders."""

    kind: ClassVar[str] = "anystory"
    foreign: ClassVar[str] = "it is no file that tools/convert.py made of AnyStory's weights"

    double: int = 19
    single: int = 38
    width: int = 3072
    context: int = 4096
    packed: int = 64
    vision: int = 1152
    reference_rank: int = 128
    router_rank: int = 128
    map_rank: int = 128
    embedder_rank: int = 128

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Form:
        return cls(**{each.name: int(values[each.name]) for each in fields(cls)})

    def model(self) -> tuple[int, int, int, int, int]:
        """What a FLUX has to have for a file of this form."""
        return self.double, self.single, self.width, self.context, self.packed

    def shapes(self) -> dict[str, dict[str, Shape]]:
        """Every name of each part, with its shape."""
        return {
            "ref": dict(self._loras(_REFERENCE_DOUBLE, ("x_embedder", self.packed), self.reference_rank)),
            "router": {
                **dict(self._loras(_ROUTER_DOUBLE, ("context_embedder", self.context), self.router_rank)),
                **dict(self._maps()),
                **{f"router_embedder.{name}": shape for name, shape in self._embedder()},
            },
            "redux": dict(self._embedder()),
        }

    def _loras(self, double: dict[str, tuple[int, int]], first: tuple[str, int], rank: int) -> Iterator[tuple]:
        modules = [(first[0], first[1], self.width)]
        for blocks, count, inside in (
            ("transformer_blocks", self.double, double),
            ("single_transformer_blocks", self.single, _SINGLE),
        ):
            for number in range(count):
                for name, (taken, given) in inside.items():
                    modules.append((f"{blocks}.{number}.{name}", taken * self.width, given * self.width))
        for name, taken, given in modules:
            yield f"transformer.{name}.lora_A.weight", (rank, taken)
            yield f"transformer.{name}.lora_B.weight", (given, rank)

    def _maps(self) -> Iterator[tuple[str, Shape]]:
        for blocks, count in (("transformer_blocks", self.double), ("single_transformer_blocks", self.single)):
            for number in range(count):
                for side in "qk":
                    stem = f"transformer.{blocks}.{number}.attn.processor.to_{side}_routing_map_lora_"
                    yield f"{stem}A.weight", (self.map_rank, self.width)
                    yield f"{stem}B.weight", (self.width, self.map_rank)
                    yield f"{stem}B.bias", (self.width,)

    def _embedder(self) -> Iterator[tuple[str, Shape]]:
        inner = _REDUX * self.context
        for side, taken, given in (("up", self.vision, inner), ("down", inner, self.context)):
            yield f"redux_{side}_lora_A.weight", (self.embedder_rank, taken)
            yield f"redux_{side}_lora_B.weight", (given, self.embedder_rank)
            yield f"redux_{side}_lora_B.bias", (given,)
        yield "gate_proj.weight", (1, self.context)
        yield "gate_proj.bias", (1,)


# Of each module with a LoRA, what it takes and gives, as multiples of the width.
_REFERENCE_DOUBLE = {
    "norm1.linear": (1, 6),
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out.0": (1, 1),
    "ff.net.2": (_FEED_FORWARD, 1),
}
_ROUTER_DOUBLE = {
    "norm1_context.linear": (1, 6),
    "attn.add_q_proj": (1, 1),
    "attn.add_k_proj": (1, 1),
    "attn.add_v_proj": (1, 1),
    "attn.to_add_out": (1, 1),
    "ff_context.net.2": (_FEED_FORWARD, 1),
}
_SINGLE = {
    "norm.linear": (1, 3),
    "proj_mlp": (1, _FEED_FORWARD),
    "proj_out": (1 + _FEED_FORWARD, 1),
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
}
FLUX_DEV = Form()


def form_of(found: PartShapes) -> Form:
    """The form of a file with these shapes, its ranks and sizes read from them.

    Raises ValueError with a phrase that says what is missing, unknown, or of another shape."""
    for part in PARTS:
        if part not in found:
            raise ValueError(f"it has no '{part}' among {_some(found)}")
    form = _measured(found)
    for part, expected in form.shapes().items():
        check_shapes(expected, found[part], f"{part}.")
    return form


def _measured(found: PartShapes) -> Form:
    def matrix(part: str, name: str) -> Shape:
        shape = tuple(found[part].get(name, ()))
        if len(shape) != 2:
            raise ValueError(f"its '{part}' has no matrix {name}")
        return shape

    counts = {"transformer_blocks": 0, "single_transformer_blocks": 0}
    for name in found["ref"]:
        if match := _BLOCK.match(name):
            counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
    if max(counts.values()) > len(found["ref"]):
        raise ValueError(f"it counts {max(counts.values())} blocks in {len(found['ref'])} tensors")
    reference_rank, packed = matrix("ref", "transformer.x_embedder.lora_A.weight")
    width, _ = matrix("ref", "transformer.x_embedder.lora_B.weight")
    router_rank, context = matrix("router", "transformer.context_embedder.lora_A.weight")
    block = "transformer_blocks.0" if counts["transformer_blocks"] else "single_transformer_blocks.0"
    map_rank, _ = matrix("router", f"transformer.{block}.attn.processor.to_q_routing_map_lora_A.weight")
    embedder_rank, vision = matrix("redux", "redux_up_lora_A.weight")
    return Form(
        *counts.values(), width, context, packed, vision, reference_rank, router_rank, map_rank, embedder_rank
    )  # fmt: skip


def metadata(form: Form, source: str) -> dict[str, str]:
    """What a converted file says of itself; `source` is the SHA-256 of the file that it was made from."""
    return file_metadata(form, "FLUX.1", "the authors of AnyStory", source_sha256=source)


def by_part(named: Mapping[str, Shape]) -> dict[str, dict[str, Shape]]:
    """The shapes of a converted file by part, from those under its whole names."""
    found: dict[str, dict[str, Shape]] = {}
    for name, shape in named.items():
        part, _, rest = name.partition(".")
        found.setdefault(part, {})[rest] = shape
    return found


def _some(names: Mapping[str, object]) -> str:
    listed = [str(name) for name in list(names)[:4]]
    return ", ".join(listed) + (", ..." if len(names) > len(listed) else "") or "nothing"
