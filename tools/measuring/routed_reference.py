"""Routed Reference Attention: several emblems in one scene, each with its own look; and what routing costs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .emblems import Likeness, at_boxes, known, matched
from .given import PHRASES, Given, Shape, centred, drawn_boxes, heading, paired, row, share

if TYPE_CHECKING:
    from torch import Tensor

UNPATCHED, ALONE = "unpatched", "layout bias alone"
WAYS = (
    "all references everywhere",
    "routed by masks",
    "routed by attention maps, running mean",
    "routed by attention maps, preceding layer",
)
# Of a transformer: not moved to the subjects' places.
UNMOVED = "routed by masks, references in their own places"
# Each emblem's word with the one after it, by which a layout tells the emblems of one prompt apart.
PHRASES_OF = {2: ("emblem and", "emblem on"), 3: ("emblem,", "emblem and", "emblem on")}


def study(given: Given, emblems: int, masked: bool = True, ways: Sequence[str] = WAYS) -> None:
    """Prints two tables, over `given.count` scenes of so many emblems, where the model draws them where it likes and
    with a layout bias in the same layers; references that are not `masked` are whole pictures of them, each on a plain
    ground of its own."""
    free: dict[str, list[Likeness]] = {name: [] for name in (UNPATCHED, *ways)}
    placed: dict[str, list[Likeness]] = {name: [] for name in (ALONE, *(f"and {way}" for way in ways))}
    grounds: dict[str, list[bool]] = {name: [] for name in (*free, *placed)}
    for number in range(given.count):
        case = Case(given, emblems, number, masked)
        for sample, likeness in ((case.free, free), (case.placed, placed)):
            for name in likeness:
                found, ground = sample(name)
                likeness[name] += found
                grounds[name].append(ground)
        print(f"{emblems} emblems: scene {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(f"{emblems} emblems, {given.count} scenes, where the judge finds them:\n")
    table(free, grounds)
    print(f"{emblems} emblems, {given.count} scenes, in the boxes of a layout:\n")
    table(placed, grounds)


class Case:
    """A scene of emblems that are all known: its prompt, its places, and a subject for each emblem."""

    def __init__(self, given: Given, count: int, number: int, masked: bool = True) -> None:
        import numpy as np
        import torch
        from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
        from subject_patches.nodes.layout import LayoutNode
        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import SIZE, describe, sample_scene

        rng = np.random.default_rng((2**44, count, number))
        scene = sample_scene(rng, count, 1.0)
        while any(thing.emblem.plate_colour in scene.background.colours for thing in scene.things):
            scene = sample_scene(rng, count, 1.0)
        phrases = PHRASES_OF[count]
        references = [
            known(given, thing.emblem, rng, phrase, masked) for thing, phrase in zip(scene.things, phrases, strict=True)
        ]
        self.given, self.seed, self.ground = given, number, scene.background.kind
        self.subjects = tuple(subject for each in references for subject in each.subject)
        self.identities = torch.stack([each.identity for each in references])
        drawn = draw(scene)
        self.boxes = [tuple(box) for box in drawn.boxes.tolist()]
        self.layout = LayoutNode.execute(SIZE, SIZE, "\n".join(phrases), boxes=drawn_boxes(self.boxes)).args[0]
        self.picture = torch.from_numpy(drawn.image).float()[None] / 255
        masks = torch.from_numpy(drawn.masks)
        # Of two that touch, the earlier one has the place.
        self.masks = masks & ~(masks.cumsum(0) > 1)
        self.text = describe(scene)
        self.positive = EncodePromptWithSubjects.execute(given.toy.clip, self.text, "\n".join(phrases)).args[0]

    def free(self, name: str) -> tuple[list[Likeness], bool]:
        """A likeness for each subject in a picture of the prompt, and whether its background is right."""
        image, reading = self._picture(self._referenced(self.given.toy.model, name))
        return matched(self.given.judge, image, reading, self.identities), reading.background == self.ground

    def placed(self, name: str) -> tuple[list[Likeness], bool]:
        """The same in the boxes of the layout, with a layout bias."""
        from subject_patches.nodes.layout import LayoutBiasNode

        from .layout import DEFAULTS

        model = LayoutBiasNode.execute(self.given.toy.model, self.layout, **DEFAULTS).args[0]
        image, reading = self._picture(self._referenced(model, name))
        seen = [
            any(each.shape == "emblem" and centred(each.box, box) for each in reading.objects) for box in self.boxes
        ]
        return at_boxes(self.given.judge, image, self.boxes, self.identities, seen), reading.background == self.ground

    def _picture(self, model: Any) -> tuple[Tensor, Any]:
        image = self.given.picture(self.positive, self.seed, model)
        return image, self.given.judge.findings(image)[0]

    def _referenced(self, model: Any, name: str) -> Any:
        """The model with the references, as `name` says."""
        from subject_patches.nodes.inputs import CURRENT, NEARLY_CLEAN
        from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
        from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
        from subject_patches.patches.families import family_of
        from subject_patches.patches.mechanisms.map_router import MapRouter
        from subject_patches.patches.mechanisms.mask_router import MaskRouter
        from subject_patches.patches.mechanisms.positions import SAME
        from subject_patches.patches.parts.sites import USUAL

        if name in (UNPATCHED, ALONE):
            return model
        if "everywhere" in name:
            # At the level that is usual for routed ones, so that routing alone makes the difference.
            level = NEARLY_CLEAN if family_of(model).looks_nearly_clean() else CURRENT
            return RecycledSelfAttentionNode.execute(model, self.subjects, noise_level=level).args[0]
        router = MapRouter(running_mean="running mean" in name) if "maps" in name else MaskRouter(self.masks)
        positions = SAME if UNMOVED in name else USUAL
        return RoutedReferenceAttentionNode.execute(model, self.subjects, router, positions=positions).args[0]


def table(scores: dict[str, list[Likeness]], grounds: dict[str, list[bool]]) -> None:
    """Prints a row for each name, all compared with the first."""
    import numpy as np

    print(heading("identity", "rise, paired", "looks more like another", "emblem found", "background right"))
    identity = {name: [each.identity for each in rows] for name, rows in scores.items()}
    first = next(iter(identity.values()))
    for name, rows in scores.items():
        shares = ([each.blended for each in rows], [each.emblem for each in rows], grounds[name])
        print(row(name, f"{np.mean(identity[name]):.3f}", paired(first, identity[name]), *map(share, shares)))
    print()


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: one subject and eight, by masks and by maps, and eight by a bias over all keys."""
    import torch
    from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
    from subject_patches.patches.engine.engine import add_edit
    from subject_patches.patches.families import attention_sites
    from subject_patches.patches.mechanisms.map_router import MapRouter
    from subject_patches.patches.mechanisms.mask_router import MaskRouter
    from subject_patches.patches.mechanisms.subject import Reference, Subject
    from subject_patches.patches.parts.sites import select_sites
    from subject_patches.patches.parts.window import Window

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

    # Without a threshold one subject takes as many places as eight do.
    by_maps = MapRouter(threshold=0.0)
    return {
        "routed references, one subject by masks": routed(1, stripes(1)),
        "routed references, eight subjects by masks": routed(8, stripes(8)),
        "routed references, one subject by maps": routed(1, by_maps),
        "routed references, eight subjects by maps": routed(8, by_maps),
        "routed references, eight subjects by a dense bias, not in the pack": dense,
    }


def _streams(model: Any, subjects: tuple[Any, ...]) -> tuple[Any, ...]:
    from subject_patches.nodes.references import reference_streams

    return tuple(stream for subject in subjects for stream in reference_streams(model, subject, 0, None))


def _dense_edit() -> type:
    """What routing would be without grouping: all references' keys for every query, and minus infinity in a bias
    (queries, keys) where Eq. 8 has it."""
    from dataclasses import dataclass

    import torch
    from subject_patches.patches.engine.edit import Edit
    from subject_patches.patches.mechanisms.mask_router import route_of_cover
    from subject_patches.patches.mechanisms.region import region_at

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
