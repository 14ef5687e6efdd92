"""Routed Reference Attention: several emblems in one scene, each with its own look; and what routing costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .given import PHRASES, Shape


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: one subject and eight, by masks and by maps, and eight by a mask over all keys."""
    import torch
    from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
    from subject_patches.patches.engine import add_edit
    from subject_patches.patches.router import MapRouter, MaskRouter
    from subject_patches.patches.sites import attention_sites, select_sites
    from subject_patches.patches.subject import Reference, Subject
    from subject_patches.patches.window import Window

    generator = torch.Generator().manual_seed(1)

    def subjects(count: int) -> tuple[Subject, ...]:
        size = (1, shape.channels, shape.size, shape.size)
        latents = [torch.randn(size, generator=generator) for _ in range(count)]
        return tuple(
            Subject((Reference(torch.empty(0), each, None),), phrase)
            for each, phrase in zip(latents, PHRASES, strict=False)
        )

    def stripes(count: int) -> MaskRouter:
        columns = torch.arange(shape.size) * count // shape.size
        return MaskRouter((columns == torch.arange(count)[:, None])[:, None].expand(-1, shape.size, -1))

    def routed(count: int, router: Any) -> Callable[[Any], Any]:
        return lambda model: RoutedReferenceAttentionNode.execute(model, subjects(count), router).args[0]

    def dense(model: Any) -> Any:
        sites = select_sites(attention_sites(model), "self", "decoder")
        return add_edit(model, _dense_edit()(sites, Window(), _streams(model, subjects(8)), stripes(8).masks))

    return {
        "routed references, one subject": routed(1, stripes(1)),
        "routed references, eight subjects": routed(8, stripes(8)),
        "routed references, eight subjects by maps": routed(8, MapRouter()),
        "eight subjects by a dense bias, not in the pack": dense,
    }


def _streams(model: Any, subjects: tuple[Any, ...]) -> tuple[Any, ...]:
    from subject_patches.nodes.recycled_attention import reference_streams

    return tuple(stream for subject in subjects for stream in reference_streams(model, subject, 0, None))


def _dense_edit() -> type:
    """What routing would be without grouping: all references' keys for every query, and minus infinity in a bias
    (queries, keys) where Eq. 8 has it."""
    from dataclasses import dataclass

    import torch
    from subject_patches.patches.edit import Edit
    from subject_patches.patches.region import region_at
    from subject_patches.patches.router import route_of_cover

    @dataclass(frozen=True, eq=False)
    class DenselyRouted(Edit):
        references: tuple[Any, ...]
        masks: Any

        def requests(self, sigma: float) -> Any:
            return [(reference, self.sites, ("key", "value")) for reference in self.references]

        def amend(self, call: Any, sigma: float, recorded: Any) -> None:
            cover = torch.cat([region_at(mask[None], call.chunk, call.grid, 1) for mask in self.masks.float()])
            route = route_of_cover(cover).to(call.query.device)
            for number, reference in enumerate(self.references):
                features = recorded(reference)
                bias = torch.zeros(1, route.shape[1], features["key"].shape[1], device=route.device)
                bias.masked_fill_((route != number)[..., None], -torch.inf)
                call.extend(features["key"], features["value"], bias)

    return DenselyRouted
