"""What a run keeps on the model's device besides the picture, told to the host before it loads the model.

The host leaves as much of a card free as it estimates a picture of the run's size to take, and loads the model into the
rest. What streams record is no part of that: of a reference of 768 pixels on FLUX.1 1.6 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from comfy.controlnet import ControlBase
from comfy.model_management import dtype_size

from ..families import Family
from ..parts.sites import Site
from ..parts.window import Levels
from .edit import Edit
from .streams import Stream


class Memory(ControlBase):
    """So much memory, in bytes, that a run takes besides the picture's. It stands where a ControlNet would, which the
    host asks for the same."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return self.size


def announced(conds: Mapping[str, Any], key: str, size: int) -> dict[str, Any]:
    """A guider's lists of conditionings with a list of ours that takes so many bytes."""
    return {**conds, key: [{"control": Memory(size)}]}


def longest(conds: Mapping[str, Any]) -> int:
    """How many tokens the longest prompt of a guider's lists of conditionings has."""
    given = (entry.get("cross_attn") for listed in conds.values() for entry in listed or ())
    return max((tokens.shape[1] for tokens in given if tokens is not None), default=0)


def size_kept(
    edits: Sequence[Edit], levels: Levels, family: Family, network: Any, dtype: torch.dtype, prompt: int
) -> int:
    """How many bytes the edits of a run keep on the model's device at most, with features of a `dtype`: what streams
    record at a noise level of the run's steps, and what the edits bring there. `prompt` is how many tokens the
    generation's longest prompt has."""
    measured = _Measured(family, network, dtype, prompt)
    streams = (measured.size(edits, levels, sigma) for sigma in dict.fromkeys(levels.sigmas[:-1]))
    brought = {id(tensor): tensor.numel() for edit in edits for tensor in edit.brings()}
    return max(streams, default=0) + sum(brought.values()) * dtype_size(dtype)


class _Measured:
    """The sizes of what streams keep of a network's layers, each worked out once."""

    def __init__(self, family: Family, network: Any, dtype: torch.dtype, prompt: int) -> None:
        self.family, self.network, self.dtype, self.prompt = family, network, dtype, prompt
        self._sizes: dict[tuple[int, Site, tuple[str, ...]], int] = {}

    def size(self, edits: Iterable[Edit], levels: Levels, sigma: float) -> int:
        """The bytes kept at a noise level."""
        wanted = {
            (id(stream), site, parts): stream
            for edit in edits
            if levels.lie_in(edit.window, sigma)
            for stream, sites, parts in edit.keeps(sigma)
            for site in sites
        }
        for place in wanted.keys() - self._sizes.keys():
            self._sizes[place] = self._of(wanted[place], *place[1:])
        return sum(self._sizes[place] for place in wanted)

    def _of(self, stream: Stream, site: Site, parts: tuple[str, ...]) -> int:
        """A stream's own choice among features of the form that the layer's have, without their numbers."""
        grid = self.family.grid_at(self.network, site, tuple(stream.shape[-2:]))
        given = stream.conditioning
        prompt = given[0][0].shape[1] if isinstance(given, list) else self.prompt
        of_prompt = {"prompt_key"} | ({"key", "value"} if site.kind == "cross" else set())
        features = {}
        for part in parts:
            tokens = prompt if part in of_prompt else math.prod(grid)
            shape = (stream.shape[0], tokens, self.family.channels(self.network, site, part))
            features[part] = torch.empty(shape, dtype=self.dtype, device="meta")
        return sum(tensor.numel() for tensor in stream.keep(site, grid, features).values()) * dtype_size(self.dtype)
