"""Other packs in the same graph: all keep their effect, ours keeps its own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_freelunch import FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_tomesd import TomePatchModel
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.edit import Edit
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.passes import RECORDING
from subject_patches.patches.engine.streams import Features, Stream
from subject_patches.patches.families import attention_sites
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.mechanisms import UNLIKE, Mechanism, over_mechanisms, over_unlike
from subject_patches.tests.shared.models import difference, randn, recycled, sample
from torch import Tensor

PLACE = ("output", 3, 0)
FEW = 0.003


# A replacement that behaves as IPAdapter's


@dataclass
class Adapter:
    """The layer's own attention plus one over tokens of its own, for conditioned rows; with the calls it got in the
    generation's own passes."""

    weight: float = 0.8
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        heads, rows = extra["n_heads"], len(query)
        tokens = [randn(1, 4, query.shape[-1], seed=seed).expand(rows, -1, -1) for seed in (70, 71)]
        own = optimized_attention(query, *tokens, heads)
        kinds = extra["cond_or_uncond"]
        conditioned = torch.tensor([kind == 0 for kind in kinds]).repeat_interleave(rows // len(kinds))
        output = optimized_attention(query, key, value, heads) + self.weight * own * conditioned[:, None, None]
        if RECORDING not in extra:
            self.calls.append((query, key, value, output))
        return output


SLOTS = {"self": "attn1", "cross": "attn2"}


def with_adapter(model: Any, slot: str, adapter: Adapter, *place: Any) -> Any:
    clone = model.clone()
    {"attn1": clone.set_model_attn1_replace, "attn2": clone.set_model_attn2_replace}[slot](adapter, *place)
    return clone


def outputs_of(model: Any, slot: str, seen: list[Tensor]) -> Any:
    """A clone that writes down a layer's attention output after its projection, as other packs' patches see it."""

    def keep(output: Tensor, extra: dict[str, Any]) -> Tensor:
        if (*extra["block"], extra["block_index"]) == PLACE and RECORDING not in extra:
            seen.append(output.clone())
        return output

    clone = model.clone()
    {"attn1": clone.set_model_attn1_output_patch, "attn2": clone.set_model_attn2_output_patch}[slot](keep)
    return clone


@over_mechanisms
def test_our_amendment_adds_to_another_packs_replacement(mechanism: Mechanism, model: Any) -> None:
    """In one layer the output is the other's plus our amended attention minus the plain one."""
    changes = []
    for kind, slot in SLOTS.items():
        adapter, projected = Adapter(), []
        look = Look(frozenset({Site(kind, *PLACE)}), Window())
        theirs = outputs_of(with_adapter(model, slot, adapter, *PLACE), slot, projected)
        sample(add_edit(mechanism.on(theirs), look), batch=2)
        block = getattr(model.model.diffusion_model.output_blocks[3][1].transformer_blocks[0], slot)
        assert len(adapter.calls) == len(projected) == 2
        # A forward has two chunks, of two rows each.
        seen = iter(look.seen)
        for (query, key, value, other), output in zip(adapter.calls, projected, strict=True):
            expected = other.double()
            for call in (each.call for each in itertools.islice(seen, 2)):
                rows, heads = call.chunk.rows, call.heads
                amended = dense.attention(
                    call.query,
                    call.key,
                    call.value,
                    heads,
                    call.bias_of(),
                    call.extensions,
                    [blend.function for blend in call.blends],
                )
                change = amended - dense.attention(query[rows], key[rows], value[rows], heads)
                changes.append(float(change.abs().max()))
                expected[rows] += change
            with torch.inference_mode():
                torch.testing.assert_close(output, block.to_out(expected.float()), rtol=0, atol=1e-5)
    assert max(changes) > 0.01


@over_mechanisms
def test_with_a_replacement_in_every_layer(mechanism: Mechanism, model: Any) -> None:
    """One for whole blocks, in whatever order the nodes come: both keep their effect."""

    def adapted(target: Any) -> Any:
        for site in attention_sites(model):
            target = with_adapter(target, SLOTS[site.kind], Adapter(), *site.key[:2])
        return target

    ours, theirs = sample(mechanism.on(model)), sample(adapted(model))
    result = sample(adapted(mechanism.on(model)))
    assert torch.equal(sample(mechanism.on(adapted(model))), result)
    assert difference(result, ours) > FEW
    assert difference(result, theirs) > FEW


@pytest.mark.parametrize("kind", SLOTS)
def test_an_untouched_replacement_runs_as_it_is(kind: str, model: Any) -> None:
    looked = add_edit(model, Look(frozenset({Site(kind, "input", 1, 0)}), Window()))
    patched = with_adapter(looked, SLOTS[kind], Adapter(), *PLACE)
    assert torch.equal(sample(patched), sample(with_adapter(model, SLOTS[kind], Adapter(), *PLACE)))


@over_mechanisms
def test_another_packs_attention_function_is_used(mechanism: Mechanism, model: Any) -> None:
    def sharper(function: Callable[..., Tensor], query: Tensor, *rest: Any, **values: Any) -> Tensor:
        return function(query * 2, *rest, **values)

    def override(target: Any) -> Any:
        clone = target.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = sharper
        return clone

    ours, theirs = sample(mechanism.on(model)), sample(override(model))
    result = sample(mechanism.on(override(model)))
    assert torch.equal(sample(override(mechanism.on(model))), result)
    assert difference(result, ours) > FEW
    assert difference(result, theirs) > FEW


# Layers whose batch another pack widens, as attention couple does


def widened(model: Any, *kinds: str) -> Any:
    def twice(*given: Any) -> tuple[Tensor, ...]:
        return tuple(None if each is None else each.repeat(2, 1, 1) for each in given[:3])

    def mean(output: Tensor, _: dict[str, Any]) -> Tensor:
        return torch.lerp(*output.chunk(2), 0.3)

    clone = model.clone()
    if "self" in kinds:
        clone.set_model_attn1_patch(twice)
        clone.set_model_attn1_output_patch(mean)
    if "cross" in kinds:
        clone.set_model_attn2_patch(twice)
        clone.set_model_attn2_output_patch(mean)
    return clone


@over_mechanisms
def test_a_batch_that_is_repeated_inside_a_layer(
    mechanism: Mechanism, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Every copy of a row is the row, so what the copies give is what it gives."""
    caplog.set_level(logging.WARNING)
    result = sample(widened(mechanism.on(model), "self", "cross"), batch=2)
    assert difference(result, sample(mechanism.on(model), batch=2)) < 2e-5
    assert not caplog.records


@pytest.mark.parametrize("kind", SLOTS)
def test_where_the_batch_is_whole_ours_still_works(kind: str, model: Any) -> None:
    (other,) = set(SLOTS) - {kind}
    edit = ExtendKeys(frozenset(site for site in attention_sites(model) if site.kind == kind), Window())
    assert difference(sample(widened(add_edit(model, edit), other)), sample(widened(model, other))) > FEW


@dataclass(frozen=True, eq=False)
class ExtendKeys(Edit):
    """Two more tokens for every conditioned chunk to attend to."""

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        call.extend(*(randn(1, 2, call.query.shape[-1], seed=seed) for seed in (80, 81)))


# The host's own nodes

Patch = Callable[[Any], Any]
PATCHES: dict[str, Patch] = {
    "PAG": lambda model: PerturbedAttentionGuidance.execute(model, 2.0).args[0],
    "SAG": lambda model: SelfAttentionGuidance.execute(model, 0.8, 2.0).args[0],
    "FreeU_V2": lambda model: FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).args[0],
    "HyperTile": lambda model: HyperTile.execute(model, 32, 2, 0, False)[0],
    "ToMe": lambda model: TomePatchModel.execute(model, 0.4).args[0],
    "EasyCache": lambda model: EasyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0],
    "LazyCache": lambda model: LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0],
}


RUN = {"size": (12, 16), "steps": 4}


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[str, Tensor]:
    """What each mechanism and each node of the host samples by itself."""
    patched = {mechanism.name: mechanism.on(model, size=RUN["size"]) for mechanism in UNLIKE}
    patched |= {name: patch(model) for name, patch in PATCHES.items()}
    return {name: sample(each, **RUN) for name, each in patched.items()}


@over_unlike
@pytest.mark.parametrize("name", PATCHES)
def test_with_a_node_of_the_host(name: str, mechanism: Mechanism, model: Any, alone: dict[str, Tensor]) -> None:
    def ours(target: Any) -> Any:
        return mechanism.on(target, size=RUN["size"])

    theirs = PATCHES[name]
    result = sample(theirs(ours(model)), **RUN)
    assert result.isfinite().all()
    # The other way round, and with features from the cache, whatever other picture they were made for.
    again = ours(theirs(model))
    sample(again, **RUN, seed=6)
    assert torch.equal(sample(again, **RUN), result)
    assert difference(result, alone[mechanism.name]) > FEW
    assert difference(result, alone[name]) > FEW


def test_all_of_them_at_once(model: Any) -> None:
    together = model
    for name in ("PAG", "SAG", "FreeU_V2", "ToMe"):
        together = PATCHES[name](together)
    result = sample(recycled(together), size=(12, 16))
    assert result.isfinite().all()
    assert difference(result, sample(together, size=(12, 16))) > FEW


def test_what_wraps_a_call_of_the_model_sees_the_pictures_only(model: Any) -> None:
    def skipping(executor: Any, x: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(x) if len(x) == 1 else executor(x, timesteps, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", skipping)
    assert torch.equal(sample(recycled(clone)), sample(recycled(model)))
