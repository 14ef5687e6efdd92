"""AnyStory's two LoRAs on a FLUX: they act while one of its streams runs, and are not there otherwise.

They are hung on the network by the host's own injections, as its bypassed LoRAs are, and never change a weight: the
same layers serve the picture, which must not see them. While none is on, an output is the layer's own tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.utils
from comfy.patcher_extension import PatcherInjection
from torch import Tensor

if TYPE_CHECKING:
    from ...encoders.anystory import AnyStory

REFERENCES, ROUTER = "ref", "router"
# Told what a layer took and gave, before a LoRA adds to it.
Listener = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class _Part:
    """A LoRA, by its name in the file, and the channels of a layer's output that it is for (None: all)."""

    name: str
    channels: slice | None


class Loras:
    """The LoRAs of one patched MODEL, each with its strength."""

    def __init__(self, anystory: AnyStory, reference_strength: float, router_strength: float) -> None:
        self.anystory = anystory
        self.strengths = {REFERENCES: reference_strength, ROUTER: router_strength}
        self.parts = {stream: _parts(anystory, stream) for stream in (REFERENCES, ROUTER)}
        self.listeners: dict[str, Listener] = {}
        self._on: str | None = None
        self._handles: list[Any] = []

    def injection(self) -> PatcherInjection:
        """What the host hangs on the network when it loads the MODEL, and takes away with it."""
        return PatcherInjection(inject=self._inject, eject=self._eject)

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        """The LoRA of one stream acts inside."""
        self._on = stream
        try:
            yield
        finally:
            self._on = None

    @contextmanager
    def listening(self, layer: str, listener: Listener) -> Iterator[None]:
        """A layer's input and output are told to `listener` inside."""
        self.listeners[layer] = listener
        try:
            yield
        finally:
            del self.listeners[layer]

    def _inject(self, patcher: Any) -> None:
        if not self._handles:
            for layer in dict.fromkeys((*self.parts[REFERENCES], *self.parts[ROUTER])):
                module = patcher.model.diffusion_model.get_submodule(layer)
                self._handles.append(module.register_forward_hook(self._hook(layer)))

    def _eject(self, patcher: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, layer: str) -> Callable[..., Tensor | None]:
        def hook(module: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if layer in self.listeners:
                self.listeners[layer](given[0], output)
            parts = self.parts[self._on].get(layer, ()) if self._on else ()
            strength = self.strengths[self._on] if parts else 0.0
            return self._added(parts, strength, given[0], output) if strength else None

        return hook

    def _added(self, parts: tuple[_Part, ...], strength: float, given: Tensor, output: Tensor) -> Tensor:
        output = output.clone()
        for part in parts:
            down, up = (self.anystory.module(f"{part.name}.lora_{side}") for side in "AB")
            share = output if part.channels is None else output[..., part.channels]
            share += strength * up(down(given))
        return output


def _parts(anystory: AnyStory, stream: str) -> dict[str, tuple[_Part, ...]]:
    """The LoRAs of a stream by the layer of the host's FLUX that they are for: the host keeps several layers as one."""
    form = anystory.form
    sizes = {"depth": form.double, "depth_single_blocks": form.single, "hidden_size": form.width}
    places = comfy.utils.flux_to_diffusers(sizes)
    found: dict[str, tuple[_Part, ...]] = {}
    for name in form.shapes()[stream]:
        if not name.endswith(".lora_A.weight"):
            continue
        lora = name.removesuffix(".lora_A.weight")
        place = places[f"{lora.removeprefix('transformer.')}.weight"]
        key, offset = place[:2] if isinstance(place, tuple) else (place, None)
        channels = None if offset is None else slice(offset[1], offset[1] + offset[2])
        layer = key.removesuffix(".weight")
        found[layer] = (*found.get(layer, ()), _Part(f"{stream}.{lora}", channels))
    return found
