"""AnyStory beside what else acts in a FLUX: other packs' attention and blocks, LoRAs, the host's masks and reference
latents, and the pack's own nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from comfy.hooks import HookKeyframe, HookKeyframeGroup, create_hook_lora
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.dual_branch import BRANCH_KEY
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.prompt import SPANS_KEY
from subject_patches.patches.parts.window import Window
from torch import Tensor

from ..shared.anystory_models import golden_model, told
from ..shared.anystory_runs import WHOLE, hooks_of, prompt, sample, settings
from ..shared.anystory_watch import Watch
from ..shared.look import Look
from ..shared.models import AUXILIARY, CONCEPT, difference, integrated, laid_out, randn, recycled, reference, subject

OVERRIDE = "optimized_attention_override"


@pytest.fixture(scope="module")
def model() -> Any:
    return golden_model()


@dataclass
class Sage:
    """Another pack's attention in the host's slot, composed with nothing. Notes the masks it meets."""

    masks: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, function: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        mask = named.get("mask", rest[1] if len(rest) > 1 else None)
        if mask is not None:
            self.masks.append((*mask.shape, q.shape[-2]))
        return function(q, k, 1.01 * v, *rest, **named)


def with_sage(model: Any, sage: Sage) -> Any:
    patched = model.clone()
    patched.model_options["transformer_options"][OVERRIDE] = sage
    return patched


def test_another_packs_attention_in_any_order(model: Any) -> None:
    """Set before the node or behind it, it is used for all streams, and the bits are the same."""
    before = sample(told(with_sage(model, Sage()), settings()))
    behind = sample(with_sage(told(model, settings()), Sage()))
    assert torch.equal(before, behind)
    assert difference(before, sample(told(model, settings()))) > 1e-4


@pytest.mark.parametrize("count", [1, 8])
def test_no_mask_over_queries_and_keys(count: int, model: Any) -> None:
    """A bias is one number a key at most, for however many subjects."""
    sage = Sage()
    given = settings(count=count, router=count > 1, shift=-0.5)
    sample(with_sage(told(model, given), sage), batch=2)
    assert sage.masks
    assert all(shape[-3] == 1 for shape in sage.masks)


@dataclass
class Counting:
    """Another pack's replacement of a block: doubles what the block adds to the picture."""

    def __call__(self, arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        before = arguments["img"].clone()
        result = extra["original_block"](arguments)
        return {**result, "img": 2 * result["img"] - before}


def test_another_packs_block_in_any_order(model: Any) -> None:
    """The router runs beside another pack's replacement of a block."""

    def replaced(model: Any) -> Any:
        patched = model.clone()
        patched.set_model_patch_replace(Counting(), "dit", "double_block", 1)
        return patched

    before, behind = sample(told(replaced(model), settings())), sample(replaced(told(model, settings())))
    assert torch.equal(before, behind)
    assert difference(before, sample(told(model, settings()))) > 1e-3


def test_a_lora_on_the_model(model: Any) -> None:
    """The host's own patch of a weight acts on every stream: a reference is looked at anew."""
    patched, watch = told(model, settings()), Watch()
    key = "diffusion_model.double_blocks.0.img_attn.proj.weight"
    tuned = patched.clone()
    assert tuned.add_patches({key: ("diff", (0.1 * randn(64, 64, seed=50),))}, 1.0)
    with watch.over(model.model.diffusion_model):
        plain, changed, again = sample(patched), sample(tuned), sample(patched)
    assert watch.looks == 2
    assert difference(changed, plain) > 1e-3
    assert torch.equal(again, plain)


def test_keyframes_of_hooks_are_those_of_the_step(model: Any) -> None:
    """In the picture's calls and its references', which are looked at without noise."""
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    factors = {f"{name}.lora_up.weight": randn(64, 2, seed=90), f"{name}.lora_down.weight": randn(2, 64, seed=91)}
    hooks, keyframes = create_hook_lora(factors, 1.0, 0.0), HookKeyframeGroup()
    for number, strength in enumerate((1.0, 0.4, 0.0)):
        keyframes.add(HookKeyframe(strength, number / 3))
    hooks.set_keyframes_on_hooks(keyframes)
    seen: dict[int, list[float]] = {}

    def look(layer: Any, given: Any) -> None:
        seen.setdefault(given[0].shape[1], []).append(float(layer.weight.double().sum()))

    handle = model.model.diffusion_model.double_blocks[0].img_attn.proj.register_forward_pre_hook(look)
    try:
        sample(model, positive=prompt(hooks=hooks), steps=6)
        ((places, alone),) = seen.items()
        seen.clear()
        sample(told(model, settings()), positive=prompt(hooks=hooks), steps=6)
    finally:
        handle.remove()
    assert len(set(alone)) == 3
    # References are of 6 x 8 latent pixels.
    assert (seen[places], seen[12]) == (alone, alone)


def _known_prompt() -> list[list[Any]]:
    """A prompt that knows where its phrases are."""
    return prompt(**{SPANS_KEY: {"subject": ((2, 4),), "scene": ((5, 6),)}})


def _layout() -> Layout:
    half = torch.zeros(20, 30, dtype=torch.bool)
    half[:, :15] = True
    return Layout(30, 20, (Region("subject", half), Region("scene", ~half)))


@pytest.mark.parametrize("other", ["layout bias", "recycled self-attention", "dual branch"])
def test_with_another_node_of_the_pack_in_any_order(other: str, model: Any) -> None:
    """Both have their effect, and the order of nodes does not matter."""
    who = subject(reference(channels=4))
    nodes: dict[str, Callable[[Any], Any]] = {
        "layout bias": lambda model: laid_out(model, _layout(), guidance_weight=0.5),
        "recycled self-attention": lambda model: recycled(model, (who,), sites="usual"),
        "dual branch": lambda model: integrated(model, auxiliary=_auxiliary(), concept=_concept()),
    }
    node, given = nodes[other], settings()
    positive = _concept() if other == "dual branch" else _known_prompt()
    before, behind, *alone = (
        sample(each, positive=positive, size=(12, 12))
        for each in (told(node(model), given), node(told(model, given)), node(model), told(model, given))
    )
    assert difference(before, behind) < 1e-5
    for each in alone:
        assert difference(before, each) > 1e-3


def _concept() -> list[list[Any]]:
    return prompt(**{BRANCH_KEY: CONCEPT})


def _auxiliary() -> list[list[Any]]:
    return prompt(9, **{BRANCH_KEY: AUXILIARY})


def test_maps_are_told_to_who_looks(model: Any) -> None:
    """Every layer's routes, by subject, over the picture's places."""
    look = Look(frozenset(attention_sites(model)), Window())
    sample(add_edit(told(model, settings(count=3)), look), batch=2)
    for seen in look.seen:
        (note,) = (note for note in seen.call.notes if note.name == "routing map")
        assert note.labels == ("subject 1", "subject 2", "subject 3")
        maps = note.maps()
        assert maps.shape == (2, 3, 5, 6)
        assert (maps.sum(1) == 1).all()
    assert len(look.seen) == 2 * 4


def test_two_nodes_stack(model: Any) -> None:
    """Subjects of two nodes are all seen, each node's routed among themselves."""
    one, two = settings(), settings(seed=100)
    both = sample(told(told(model, one), two))
    for each in (one, two):
        assert difference(both, sample(told(model, each))) > 1e-3
    assert hooks_of(model) == 0
    # Without routing, two nodes are one with all subjects.
    apart = [settings(count=1, router=False, seed=seed) for seed in (0, 100)]
    whole = replace(
        apart[0],
        names=("a", "b"),
        tokens=torch.cat([each.tokens for each in apart], 1),
        references=sum((each.references for each in apart), ()),
    )
    stacked = sample(told(told(model, apart[0]), apart[1]))
    assert difference(stacked, sample(told(model, whole))) < 1e-5


def test_with_the_hosts_mask_over_tokens(model: Any) -> None:
    """A style model's attention bias in the conditioning still says what it said."""
    patched = told(model, settings(token_window=WHOLE))
    values = {"attention_mask_img_shape": (1, 1)}
    zero = sample(patched, positive=prompt(attention_mask=torch.zeros(1, 8, 8), **values))
    assert difference(zero, sample(patched)) < 1e-5
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 2:5] = -4
    assert difference(sample(patched, positive=prompt(attention_mask=mask, **values)), zero) > 1e-4


def test_with_the_hosts_reference_latents(model: Any) -> None:
    """Another picture's tokens behind the picture's are no places of it: only the picture's see subjects."""
    positive = prompt(reference_latents=[randn(1, 4, 8, 10, seed=60)])
    result = sample(told(model, settings()), positive=positive)
    assert result.isfinite().all()
    for other in (sample(model, positive=positive), sample(told(model, settings()))):
        assert difference(result, other) > 1e-3
