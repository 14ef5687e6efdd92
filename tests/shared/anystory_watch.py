"""What the passes over a FLUX with AnyStory give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from subject_patches.patches.anystory.anystory_router import RouterStream
from subject_patches.patches.engine.openings import APART
from torch import Tensor

from .anystory_models import packed


class Watch:
    """What every pass over a network gives: its streams after each block, as the golden cases name them, its result,
    and the router's maps. A pass over references is told by its timestep."""

    def __init__(self) -> None:
        self.passes: list[dict[str, Tensor]] = []
        self.references: dict[str, Tensor] = {}
        self.looks = 0
        self.maps: list[Tensor] = []
        self.logits: list[Tensor] = []

    @contextmanager
    def over(self, network: Any) -> Iterator[None]:
        handles = [network.register_forward_pre_hook(self._begins), network.register_forward_hook(self._ends)]
        for kind, blocks in (("double", network.double_blocks), ("single", network.single_blocks)):
            for number, block in enumerate(blocks):
                handles.append(block.register_forward_hook(self._block(kind, number), with_kwargs=True))
        advance = RouterStream._advance

        def seen(stream: RouterStream, *given: Any) -> None:
            self.logits.append(stream.logits)
            self.maps.append(stream.maps)
            advance(stream, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RouterStream, "_advance", seen)
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _begins(self, module: Any, given: tuple[Any, ...]) -> None:
        self.of_references = float(given[1][0]) == 0
        self.looks += self.of_references
        if not self.of_references:
            self.passes.append({})

    def _ends(self, module: Any, given: tuple[Any, ...], output: Tensor) -> None:
        if not self.of_references:
            self.passes[-1]["out"] = packed(output)

    def _block(self, kind: str, number: int) -> Callable[..., None]:
        name = f"{kind}{number}"

        def hook(module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
            image, text = (each.clone() for each in output) if kind == "double" else (output.clone(), None)
            if self.of_references:
                # Behind the text token that the host needs; subjects are rows.
                own = image if kind == "double" else image[:, 1:]
                self.references[f"{name}.ref"] = own.flatten(0, 1)[None]
            elif APART in named["transformer_options"]:
                self.passes[-1][f"{name}.router"] = image if text is None else text
            elif kind == "double":
                self.passes[-1] |= {f"{name}.img": image, f"{name}.txt": text}
            else:
                self.passes[-1][f"{name}.txt_img"] = image

        return hook
