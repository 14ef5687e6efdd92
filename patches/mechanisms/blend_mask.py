"""Adaptive mask blending (Layout-and-Retouch, section 3.2.2): where the retouched picture is the target's and where it
stays the layout's, from a segmenter's mask and from the cross-attention to the subject's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.call import AttentionCall
from ..engine.chunk import Chunk
from ..engine.edit import Edit
from ..engine.streams import Features, Stream
from ..parts.masks import resize_mask
from ..parts.prompt import SPANS_KEY, canonical
from ..parts.rows import in_turn
from .attention_maps import attention_maps, normalised, resized, spread_out
from .layout import tokens_of
from .region import region_at

# The mask is made at this many places a latent pixel, each way: no attention layer is finer than the latents, and a
# distance that is divided by the largest one needs no finer grid.
FINENESS = 2

# Equations. All masks are of one picture, (height, width).


def thresholded(attention: Tensor, threshold: float) -> Tensor:
    """M^c: where the averaged attention, brought to 0 to 1, is at least `threshold`, above 0; (h, w) to bool."""
    return normalised(attention) >= threshold


def united(attended: Tensor, segmented: Tensor, both: bool) -> Tensor:
    """M^k, the first equation: OR of M^c and M^SAM. The text before it speaks of discarding the noise of M^c by M^SAM,
    which is AND: that with `both`."""
    return attended & segmented if both else attended | segmented


def distance_weight(inside: Tensor) -> Tensor:
    """Normalize(D_l2(M^k)) of the second equation: 0.5 at the mask's edge to 1 at its innermost place, 0 outside; bool
    to float32. A mask without an edge is 1 everywhere."""
    from scipy.ndimage import distance_transform_edt

    if not bool(inside.any()) or bool(inside.all()):
        return inside.float()
    distance = torch.from_numpy(distance_transform_edt(inside.cpu().numpy())).float()
    return torch.where(inside.cpu(), 0.5 + 0.5 * distance / distance.max(), 0.0)


def without_small(inside: Tensor, smallest: float) -> Tensor:
    """C(M^c) of the second equation: without connected sets (corners count) of less than `smallest`, a share of the
    picture."""
    from scipy.ndimage import label

    sets, count = label(inside.cpu().numpy(), structure=[[1] * 3] * 3)
    sizes = torch.from_numpy(sets).flatten().bincount(minlength=count + 1)
    kept = sizes >= smallest * inside.numel()
    kept[0] = False
    return kept[torch.from_numpy(sets).long()]


@dataclass(frozen=True)
class Stages:
    """The mask of each row and what it was made of, the paper's Figure 10: `attention` and `attended` (M^c) at the
    latents' size, None without a phrase; `subject` (M^k) and `blend` (M) finer. Each (rows, height, width), float."""

    attention: Tensor | None
    attended: Tensor | None
    subject: Tensor
    blend: Tensor

    def named(self) -> dict[str, Tensor]:
        stages = {
            "subject attention": self.attention,
            "thresholded attention": self.attended,
            "subject region": self.subject,
            "adaptive mask": self.blend,
        }
        return {name: stage for name, stage in stages.items() if stage is not None}

    def note(self, call: AttentionCall) -> None:
        """Tells the stages at a call, at its grid."""
        stages, rows = self.named(), len(call.query)

        def maps() -> Tensor:
            found = [region_at(stage, call.chunk, call.grid, rows).unflatten(1, call.grid) for stage in stages.values()]
            return torch.stack([each.expand(rows, -1, -1) for each in found], 1)

        call.note("blend mask, stage by stage", maps, tuple(stages))


@dataclass(frozen=True, eq=False)
class AdaptiveMask:
    """How to make the mask: `segmented` (1 or batch, height, width) of 0 to 1, any size, or None; the `phrase` of the
    subject or ""; at least one of the two. `threshold` of the attention, 0 to 1; `smallest` set, a share of the
    picture; AND instead of OR with `both`. The value on a BLEND_MASK link."""

    segmented: Tensor | None
    phrase: str
    threshold: float = 0.3
    smallest: float = 0.01
    both: bool = False

    def check(self, prompts: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError when the phrase is known to none of a run's prompts."""
        known = {canonical(phrase): phrase for prompt in prompts for phrase in prompt.get(SPANS_KEY, ())}
        if self.phrase and canonical(self.phrase) not in known:
            named = f"it knows {', '.join(known.values())}" if known else "it knows no phrases"
            raise ValueError(
                f"The positive conditioning does not say which of its words are the blend mask's '{self.phrase}' "
                f"({named}); make it with Encode Prompt with Subjects, with '{self.phrase}' among its phrases."
            )

    def stages(self, latent: tuple[int, int], attention: Tensor | None = None) -> Stages | None:
        """The mask of a picture of `latent` (height, width) pixels, with the attention (rows, *latent) gathered so far.
        None while there is nothing to make it of."""
        if attention is None and self.segmented is None:
            return None
        size = (FINENESS * latent[0], FINENESS * latent[1])
        if attention is None:
            return self.of_the_segmenter(size)
        segmented = None if self.segmented is None else resize_mask(self.segmented, size) >= 0.5
        attention = attention.cpu()
        attended = torch.stack([thresholded(each, self.threshold) for each in attention])
        finer = functional.interpolate(attended[:, None].float(), size, mode="nearest")[:, 0] > 0
        sure = torch.stack([without_small(each, self.smallest) for each in attended])
        sure = functional.interpolate(sure[:, None].float(), size, mode="nearest")[:, 0]
        subject = finer
        if segmented is not None:
            segmented = in_turn(segmented, len(finer))
            subject = united(finer, segmented, self.both)
            # What AND discards is not to come back by the sum.
            sure = sure * segmented if self.both else sure
        blend = (torch.stack([distance_weight(each) for each in subject]) + sure).clamp(max=1)
        return Stages(attention, attended.float(), subject.float(), blend)

    def of_the_segmenter(self, size: tuple[int, int]) -> Stages:
        """The mask at a (height, width), of the segmenter's alone."""
        segmented = resize_mask(self.segmented, size) >= 0.5
        return Stages(None, None, segmented.float(), torch.stack([distance_weight(mask) for mask in segmented]))


@dataclass
class MaskInRun:
    """An adaptive mask in one sampling run: gathers attention, and makes the mask of what earlier noise levels gave, so
    that it does not depend on the order in which layers and chunks run."""

    mask: AdaptiveMask
    _sigma: float = float("nan")
    _earlier: Tensor | None = None
    _here: Tensor | None = None
    _cover: Tensor | None = None
    _stages: Stages | None = None
    _made: tuple[float, tuple[int, int]] | None = None

    def add(self, sigma: float, attention: Tensor, cover: Tensor | None = None) -> None:
        """More attention, (rows, height, width) at the latents' size; `cover` of that shape says where it is known, for
        a tile of the picture, and everywhere without it. What tiles know twice counts once."""
        self._arrive(sigma)
        if self._here is not None and self._here.shape != attention.shape:
            # A sampler may change the size between two steps, and within one.
            self._here, self._cover = None, None
        here = torch.zeros_like(attention) if self._here is None else self._here
        known = torch.ones_like(attention) if cover is None else cover
        self._here, self._cover = here + attention, known if self._cover is None else self._cover + known

    def stages(self, sigma: float, latent: tuple[int, int]) -> Stages | None:
        """The mask at a noise level; see `AdaptiveMask.stages`."""
        self._arrive(sigma)
        if self._made != (sigma, latent):
            earlier = None if self._earlier is None else resized(self._earlier[:, None], latent)[:, 0]
            self._stages, self._made = self.mask.stages(latent, earlier), (sigma, latent)
        return self._stages

    def _arrive(self, sigma: float) -> None:
        if sigma == self._sigma:
            return
        if self._here is not None:
            # The sum serves as well as the mean: only its shape counts.
            most = self._cover.amax()
            here = self._here if bool((self._cover == most).all()) else self._here * most / self._cover.clamp(min=1)
            if self._earlier is None or len(self._earlier) != len(here):
                self._earlier = here
            else:
                self._earlier = resized(self._earlier[:, None], here.shape[-2:])[:, 0] + here
        self._sigma, self._here, self._cover = sigma, None, None


@dataclass(frozen=True, eq=False)
class Gathering(Edit):
    """Watches cross-attention for a mask: the share of each place's attention that lies on the subject's words, summed
    over heads, words and layers."""

    mask: MaskInRun

    def observe(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        groups = tokens_of(call.chunk.spans, [canonical(self.mask.mask.phrase)])
        maps = attention_maps(call, [[token for tokens in groups.values() for token in tokens]]) if groups else None
        if groups and (call.grid is None or call.prompt is None):
            call.leave("Adaptive Swap Mask")
        if maps is not None:
            self.mask.add(sigma, *on_canvas(maps[:, :1], call.chunk))


def on_canvas(maps: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
    """A call's maps (rows, 1, h, w) at the latents' size, (rows or pictures, *latent), 0 outside of a chunk's part; and
    where they are known, of a tile."""
    whole = spread_out(functional.interpolate(maps.float(), tuple(chunk.size), mode="bilinear"), chunk)[:, 0]
    if chunk.pictures is None:
        return whole, None
    return whole, spread_out(maps.new_ones((len(maps), 1, *chunk.size)), chunk)[:, 0]
