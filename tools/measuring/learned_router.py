"""The trained router: how well its maps fit, against attention maps, what it does to emblems' looks, and its cost."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hosting.errors import ToolError

from .given import PHRASES, Given, Shape, heading, mean, paired, row, share
from .learned import random_subjects, the_encoder
from .routed_reference import ALONE, UNPATCHED, Case

if TYPE_CHECKING:
    from .emblems import Likeness

    # What `Case.placed` gives of a scene: a likeness for each emblem, and whether the background is right.
    Placed = tuple[list[Likeness], bool]

EVERYWHERE, MASKS, ATTENTION = "all references everywhere", "routed by masks", "routed by attention maps"
DEFAULT, COARSE = "routed by encoder, refined maps", "routed by encoder, coarse maps"
# The same where the router takes over at other shares of the schedule than by default.
FROM = {f"{DEFAULT}, from {share} of the schedule": share for share in (0.0, 0.15, 0.5)}
WAYS = (EVERYWHERE, MASKS, ATTENTION, DEFAULT, COARSE, *FROM)
TIMESTEPS = (100, 400, 700, 800, 900)
MAPS = ("coarse", "refined", "attention maps, running mean", "attention maps, preceding layer")


class EncodedCase(Case):
    """A scene of emblems that a trained encoder knows."""

    def __init__(self, given: Given, encoder: Any, count: int, number: int) -> None:
        from subject_patches.nodes.subject_encoder import EncodeSubjectsNode

        super().__init__(given, count, number)
        self.encoder = encoder
        self.subjects = EncodeSubjectsNode.execute(self.subjects, encoder, given.toy.vae).args[0]

    def _referenced(self, model: Any, name: str) -> Any:
        from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
        from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode

        if name in (UNPATCHED, ALONE):
            return model
        if name == EVERYWHERE:
            return RecycledSelfAttentionNode.execute(model, self.subjects).args[0]
        return RoutedReferenceAttentionNode.execute(model, self.subjects, self.router(name)).args[0]

    def router(self, name: str) -> Any:
        """The ROUTER of a row, or of one of MAPS."""
        from subject_patches.nodes.router import LEARNED, MEAN, PRECEDING, RouteByAttentionNode, RouteByEncoderNode
        from subject_patches.patches.mechanisms.mask_router import MaskRouter

        if name == MASKS:
            return MaskRouter(self.masks)
        if "attention maps" in name:
            return RouteByAttentionNode.execute(maps=PRECEDING if "preceding" in name else MEAN).args[0]
        if name in FROM:
            return RouteByEncoderNode.execute(self.encoder, learned_from=FROM[name]).args[0]
        if name in (DEFAULT, COARSE):
            return RouteByEncoderNode.execute(self.encoder, "coarse" if name == COARSE else "refined").args[0]
        return RouteByEncoderNode.execute(self.encoder, "coarse" if name == "coarse" else "refined", LEARNED).args[0]

    def overlaps(self, name: str, at: int) -> dict[tuple[int, int], list[float]]:
        """Intersection over union of each subject's places with its true ones, by the grid of the self-attentions whose
        references go by it: in the scene itself under the noise of a timestep, in one pass of the model."""
        import comfy.sample
        import comfy.samplers
        import torch
        from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
        from subject_patches.patches.engine.engine import add_edit
        from subject_patches.patches.families import attention_sites
        from subject_patches.patches.parts.window import Window
        from subject_patches.toy.sampling import noise_of

        toy, found = self.given.toy, defaultdict(list)
        model = RoutedReferenceAttentionNode.execute(toy.model, self.subjects, self.router(name)).args[0]
        sites = frozenset(site for site in attention_sites(model) if site.kind == "self")
        model = add_edit(model, _watching()(sites, Window(), self.masks, found))
        sigma = float(model.get_model_object("model_sampling").sigma(torch.tensor(float(at))))
        comfy.sample.sample_custom(
            model, noise_of([self.seed]), 1.0, comfy.samplers.sampler_object("euler"), torch.tensor([sigma, 0.0]),
            self.positive, toy.encode([""]), toy.vae.encode(self.picture), disable_pbar=True, seed=0,
        )  # fmt: skip
        return found


def _watching() -> type:
    from dataclasses import dataclass

    from subject_patches.patches.engine.edit import Edit
    from subject_patches.training.router import overlap, true_maps

    @dataclass(frozen=True, eq=False)
    class Watching(Edit):
        """Puts the overlap of every routing map with the true masks into `found`."""

        masks: Any
        found: dict[tuple[int, int], list[float]]

        def observe(self, call: Any, sigma: float, recorded: Any) -> None:
            for note in call.notes:
                truth = true_maps(self.masks[None].float(), call.grid).bool()
                self.found[call.grid] += overlap(note.maps().flatten(2).bool(), truth).flatten().tolist()

    return Watching


def routes(given: Given, emblems: int) -> None:
    """Prints how well routes fit the true masks, over `given.count` scenes of so many emblems."""
    encoder = _routed_encoder()
    found: dict[tuple[int, str], dict[tuple[int, int], list[float]]] = {}
    for number in range(given.count):
        case = EncodedCase(given, encoder, emblems, number)
        for at in TIMESTEPS:
            for name in MAPS:
                rows = found.setdefault((at, name), defaultdict(list))
                for grid, overlaps in case.overlaps(name, at).items():
                    # Of a scene's emblems and layers of a grid the mean: scenes are what is independent.
                    rows[grid].append(sum(overlaps) / len(overlaps))
        print(f"{emblems} emblems: scene {number + 1} of {given.count}", file=sys.stderr, flush=True)
    grids = sorted({grid for rows in found.values() for grid in rows}, reverse=True)
    print(f"{emblems} emblems, {given.count} scenes; intersection over union with the true masks:\n")
    print(heading(*(f"{height} x {width}" for height, width in grids), rows="timestep and maps"))
    for (at, name), rows in found.items():
        print(row(f"{at}, {name}", *(_with_error(rows[grid]) for grid in grids)))
    print()


def _with_error(values: list[float]) -> str:
    import numpy as np

    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.2f} ± {error:.2f}"


def study(given: Given, emblems: int) -> None:
    """Prints a table over `given.count` scenes of so many emblems, in the boxes of a layout."""
    encoder = _routed_encoder()
    scenes: dict[str, list[Placed]] = {name: [] for name in (ALONE, *WAYS)}
    for number in range(given.count):
        case = EncodedCase(given, encoder, emblems, number)
        for name, seen in scenes.items():
            seen.append(case.placed(name))
        print(f"{emblems} emblems: scene {number + 1} of {given.count}", file=sys.stderr, flush=True)
    print(f"{emblems} emblems, encoded, {given.count} scenes, in the boxes of a layout:\n")
    table(scenes)


def table(scenes: dict[str, list[Placed]]) -> None:
    """Prints a row for each name, of its scenes; errors are over the scenes, which are what is independent."""
    import numpy as np
    from subject_patches.nodes.router import LEARNED_FROM

    identities = {name: [mean(each.identity for each in found) for found, _ in seen] for name, seen in scenes.items()}
    points = {name: [100 * mean(each.blended for each in found) for found, _ in seen] for name, seen in scenes.items()}

    def against(values: dict[str, list[float]], name: str, others: Iterable[str], places: int) -> list[str]:
        return [paired(values[other], values[name], places) for other in others]

    identity = {"attention maps": ATTENTION, f"{LEARNED_FROM:g}": DEFAULT}
    blends = {"attention maps": ATTENTION, "masks": MASKS, f"{LEARNED_FROM:g}": DEFAULT}
    rises, blended = ([f"against {other}" for other in others] for others in (identity, blends))
    titles = ("identity", "rise, paired", *rises, "looks more like another", *blended)
    print(heading(*titles, "emblem found", "background right"))
    for name, seen in scenes.items():
        error = np.std(points[name], ddof=1) / len(seen) ** 0.5 if len(seen) > 1 else float("nan")
        cells = [f"{mean(identities[name]):.3f}", *against(identities, name, (ALONE, *identity.values()), 3)]
        cells += [f"{mean(points[name]):.0f} ± {error:.0f}%", *against(points, name, blends.values(), 1)]
        emblems = [each.emblem for found, _ in seen for each in found]
        print(row(name, *cells, share(emblems), share([ground for _, ground in seen])))
    print()


def _routed_encoder() -> Any:
    from subject_patches.toy.train_router import TRAINED_BY

    encoder = the_encoder()
    if encoder.router is None:
        raise ToolError(f"{encoder.name} has no router to measure; train it: {TRAINED_BY.split('; ')[-1]}")
    return encoder


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows, of U-Nets: two random subjects where a router says that was never trained, as the node has
    it by default, and from the run's first step on."""
    import torch
    from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
    from subject_patches.nodes.router import LEARNED_FROM
    from subject_patches.patches.mechanisms.encoded_subject import RoutingFeature
    from subject_patches.patches.mechanisms.learned_router import LearnedRouter
    from subject_patches.patches.mechanisms.map_router import MapRouter
    from subject_patches.toy.routing import ROUTER
    from subject_patches.training.subject_router import FORM

    if shape.flux:
        return {}
    form = ROUTER if shape.name == "toy" else FORM
    source = torch.Generator().manual_seed(5)

    def feature() -> Any:
        own, background = (torch.randn(1, form.width, generator=source) for _ in range(2))
        return RoutingFeature("random", own, background)

    def routed(early: Any, learned_from: float) -> Callable[[Any], Any]:
        def patch(model: Any) -> Any:
            two = random_subjects(model, shape.size, source, list(PHRASES)[:2], feature)
            router = LearnedRouter("random", _random_router(model, form), early=early, learned_from=learned_from)
            return RoutedReferenceAttentionNode.execute(model, two, router).args[0]

        return patch

    name = "two of a trained encoder's subjects, routed by its router"
    return {name: routed(MapRouter(), LEARNED_FROM), f"{name} from the first step on": routed(None, 0.0)}


def _random_router(model: Any, form: Any) -> Any:
    """A router of this form with random weights for a MODEL's cross-attentions, for the host to move."""
    import comfy.ops
    import torch
    from subject_patches.encoders.loading import kept_by_host
    from subject_patches.encoders.router import RouterModules
    from subject_patches.nodes.image_prompt import layer_channels

    # Its QFormer has done its work before a picture begins, so its size does not count here.
    sizes = {"features": form.width, "width": form.width, "heads": form.heads, "depth": 1}
    modules = RouterModules(form, layer_channels(model, "cross"), comfy.ops.manual_cast, **sizes)
    generator = torch.Generator().manual_seed(6)
    for parameter in modules.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return kept_by_host(modules)
