"""AnyStory on a FLUX, with random weights of its form: what its subjects cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from .given import Shape

if TYPE_CHECKING:
    from torch import Tensor

# The ranks of the released LoRAs, as `form_for` takes them for a FLUX of the released width.
_WIDTH_A_RANK = 24
_TOKENS, _ROUTER = 81, 9


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """Rows of the benchmark, on FLUX.1's shapes alone: each patch is given a MODEL, and has subjects not cached yet."""
    if not shape.flux:
        return {}
    counts = {"one subject": 1, "two subjects": 2, "eight subjects": 8}
    return {f"AnyStory, {words}": partial(_patched, shape=shape, count=count) for words, count in counts.items()}


def _patched(model: Any, shape: Shape, count: int) -> Any:
    """As the node does by default; each reference has half the picture's side."""
    import torch
    from subject_patches.nodes.anystory import AnyStoryNode

    side = shape.size // 2
    latents = [torch.randn(1, shape.channels, side, side, generator=_generator(number)) for number in range(count)]
    anystory = random_weights(form_for(model))
    return AnyStoryNode.execute(model, anystory, random_subjects(anystory, latents)).args[0]


def form_for(model: Any, rank: int | None = None, vision: int = 12) -> Any:
    """The form of weights for a FLUX, their ranks `rank`, by default as large for its width as the released ones."""
    from subject_patches.encoders.anystory_file import Form

    network = model.model.diffusion_model
    blocks = len(network.double_blocks), len(network.single_blocks)
    ranks = (rank or network.hidden_size // _WIDTH_A_RANK,) * 4
    return Form(*blocks, network.hidden_size, network.params.context_in_dim, network.in_channels, vision, *ranks)


@cache
def random_weights(form: Any) -> Any:
    """Random weights of a form, which keep activations at about unit size."""
    import torch
    from subject_patches.encoders.anystory import AnyStory, modules_of
    from subject_patches.encoders.loading import kept_by_host

    shapes = {f"{part}.{name}": shape for part, named in form.shapes().items() for name, shape in named.items()}
    root, source = modules_of(shapes), _generator(7)
    weights = {name: torch.randn(shape, generator=source) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    root.load_state_dict(weights, assign=True)
    return AnyStory("random", form, kept_by_host(root))


def random_subjects(anystory: Any, latents: list[Tensor]) -> tuple[Any, ...]:
    """Subjects with these latents (1, channels, height, width) as their references, all of them inside the mask, and
    random tokens."""
    import torch
    from subject_patches.patches.anystory.anystory_subject import AnyStorySubject
    from subject_patches.patches.parts.cache import FeatureCache

    made = []
    for number, reference in enumerate(latents):
        source = _generator(100 + number)
        tokens, router = (torch.randn(1, n, anystory.form.context, generator=source) for n in (_TOKENS, _ROUTER))
        places = torch.ones(1, reference.shape[-2] * reference.shape[-1] // 4)
        made.append(AnyStorySubject(tokens, router, reference, places, FeatureCache(2**31)))
    return tuple(made)


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)
