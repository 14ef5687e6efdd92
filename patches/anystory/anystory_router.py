"""AnyStory's router in one forward of a FLUX: a stream of its own through the host's blocks, and a map in each."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.ldm.flux.math import apply_rope1
from torch import Tensor

from ..engine.openings import APART
from .anystory import mean_queries, routes, routing_logits
from .anystory_loras import ROUTER, Loras

_BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


@dataclass
class RouterStream:
    """The router's tokens `state` (rows, subjects * tokens, width) on their way through the blocks, beside the picture
    of `places` tokens, which `behind` tokens of other pictures follow.

    Before each block it asks the weights for the map of that block; after it, its tokens attend to each other and to
    the picture's keys and values, which `see` was told."""

    network: Callable[[], Any]
    loras: Loras
    subjects: int
    places: int
    behind: int = 0
    state: Tensor | None = None
    logits: Tensor | None = None
    _seen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self, tokens: Tensor, like: Tensor, behind: int) -> None:
        """At the first block: `tokens` (1, subjects * n, context) are embedded for a batch like `like`."""
        with self.loras.on(ROUTER):
            self.state = self.network().txt_in(tokens.to(like)).expand(len(like), -1, -1)
        self.behind = behind

    @property
    def maps(self) -> Tensor:
        """The subject of each place in the block that is running: (rows, subjects, places) bool on the CPU."""
        return routes(self.logits.float()).cpu()

    def see(self, row: int, key: Tensor, value: Tensor) -> None:
        """The picture's keys and values (rows, places, channels) in the block that is running, from a row on."""
        self._seen[row] = key, value

    def around(self, kind: str, number: int, other: Any) -> Callable[..., Any]:
        """A block's replacement, composed around what stands in the host's slot for it."""

        @torch.compiler.disable
        def replaced(arguments: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
            vec = arguments["vec"]
            with self._finding(kind, number, vec, arguments["pe"]):
                result = extra["original_block"](arguments) if other is None else other(arguments, extra)
            self._advance(kind, number, vec, arguments["transformer_options"])
            return result

        return replaced

    def _block(self, kind: str, number: int) -> Any:
        network = self.network()
        return (network.double_blocks if kind == "double" else network.single_blocks)[number]

    def _finding(self, kind: str, number: int, vec: Tensor, pe: Tensor) -> AbstractContextManager[None]:
        """Inside, the block's map is found as soon as the layer that makes the picture's keys has run."""
        self.logits, self._seen = None, {}
        network = self.network()
        start = pe.shape[2] - self.behind - self.places
        image_pe = pe[:, :, start : start + self.places]
        queries = self._queries(kind, number, vec)
        norm = self._block(kind, number).norm if kind == "single" else self._block(kind, number).img_attn.norm
        width, heads = network.hidden_size, network.num_heads
        count = pe.shape[2] if kind == "single" else self.places + self.behind

        def listen(given: Tensor, output: Tensor) -> None:
            if output.shape[1] != count:
                # The tokens of another node's router.
                return
            first = output.shape[1] - self.behind - self.places
            own = slice(first, first + self.places)
            key = output[:, own, width : 2 * width] + self._projected(kind, number, "k", given[:, own])
            key = apply_rope1(norm.key_norm(key.unflatten(-1, (heads, -1)).transpose(1, 2)), image_pe)
            self.logits = routing_logits(queries, key.mean(1))

        layer = f"double_blocks.{number}.img_attn.qkv" if kind == "double" else f"single_blocks.{number}.linear1"
        return self.loras.listening(layer, listen)

    def _queries(self, kind: str, number: int, vec: Tensor) -> Tensor:
        """The routing queries: the router's tokens through the plain layer (its LoRA acts on the modulation alone here)
        and the map's own projection."""
        network, block = self.network(), self._block(kind, number)
        norm, modulation = (block.txt_norm1, block.txt_mod) if kind == "double" else (block.pre_norm, block.modulation)
        with self.loras.on(ROUTER):
            change = modulation(vec)[0]
        tokens = (1 + change.scale) * norm(self.state) + change.shift
        layer, qk_norm = (block.txt_attn.qkv, block.txt_attn.norm) if kind == "double" else (block.linear1, block.norm)
        query = layer(tokens)[..., : network.hidden_size] + self._projected(kind, number, "q", tokens)
        query = qk_norm.query_norm(query.unflatten(-1, (network.num_heads, -1)).transpose(1, 2))
        # Rotated by its place, which is zero: as it is.
        return mean_queries(query, self.subjects)

    def _projected(self, kind: str, number: int, side: str, tokens: Tensor) -> Tensor:
        name = f"router.transformer.{_BLOCKS[kind]}.{number}.attn.processor.to_{side}_routing_map_lora_"
        anystory = self.loras.anystory
        return anystory.module(f"{name}B")(anystory.module(f"{name}A")(tokens))

    def _advance(self, kind: str, number: int, vec: Tensor, options: Mapping[str, Any]) -> None:
        """The router's own pass through the block, by the host's code: of a double block its text side."""
        seen = [self._seen[row] for row in sorted(self._seen)]
        if sum(len(key) for key, _ in seen) != len(self.state):
            # Another pack changed the picture's tokens here: there is nothing to attend to.
            return
        network, block = self.network(), self._block(kind, number)
        key, value = (torch.cat(each) for each in zip(*seen, strict=True))
        heads, count = network.num_heads, self.state.shape[1]
        attention = _Attention(
            *(each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (key, value)), count,
            options.get("optimized_attention_override"),
        )  # fmt: skip
        options = {**options, APART: True, "patches": {}, "optimized_attention_override": attention}
        single = kind == "single"
        ids = self.state.new_zeros((len(self.state), count + (not single), len(network.params.axes_dim)))
        pe = network.pe_embedder(ids.float())
        # A double block needs a picture too: one token, which nothing attends to.
        none = self.state.new_zeros((len(self.state), 1, self.state.shape[-1]))
        with self.loras.on(ROUTER):
            if single:
                self.state = block(self.state.clone(), vec=vec, pe=pe, transformer_options=options)
            else:
                passed = block(img=none, txt=self.state.clone(), vec=vec, pe=pe, transformer_options=options)
                self.state = passed[1]


@dataclass
class _Attention:
    """Stands in the host's slot for attention while the router's tokens pass a block: they attend to the picture's
    keys and values (rows, heads, places, width) and to each other."""

    key: Tensor
    value: Tensor
    count: int
    inner: Callable[..., Tensor] | None

    def __call__(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, **named: Any
    ) -> Tensor:
        k, v = (torch.cat([picture, own[:, :, : self.count]], 2) for picture, own in ((self.key, k), (self.value, v)))
        if self.inner is None:
            return function(q, k, v, heads, **named)
        return self.inner(function, q, k, v, heads, **named)


def router_stream(network: Any, loras: Loras, subjects: int, places: int) -> RouterStream:
    """The stream of one forward, which must not keep the network: a model may be compiled with its options."""
    return RouterStream(weakref.ref(network), loras, subjects, places)
