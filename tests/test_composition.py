"""Other packs in the same graph: all keep their effect, ours keeps its own."""

from __future__ import annotations

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
from subject_patches.patches.call import AttentionCall
from subject_patches.patches.edit import Edit
from subject_patches.patches.engine import add_edit
from subject_patches.patches.sites import Site
from subject_patches.patches.streams import Features, Stream
from subject_patches.patches.window import Window
from subject_patches.tests import dense
from subject_patches.tests.look import Look
from subject_patches.tests.models import difference, generator, recycled, sample, small_model
from torch import Tensor

WIDTH = 32
PLACE = ("output", 3, 0)
FEW = 0.003


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


# A replacement that behaves as IPAdapter's


@dataclass
class Adapter:
    """The layer's own attention plus one over tokens of its own, for conditioned rows; with the calls it got."""

    key: Tensor = field(default_factory=lambda: randn(1, 4, WIDTH, seed=70))
    value: Tensor = field(default_factory=lambda: randn(1, 4, WIDTH, seed=71))
    weight: float = 0.8
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        heads, rows = extra["n_heads"], len(query)
        own = optimized_attention(query, self.key.expand(rows, -1, -1), self.value.expand(rows, -1, -1), heads)
        kinds = extra["cond_or_uncond"]
        conditioned = torch.tensor([kind == 0 for kind in kinds]).repeat_interleave(rows // len(kinds))
        output = optimized_attention(query, key, value, heads) + self.weight * own * conditioned[:, None, None]
        self.calls.append((query, key, value, output))
        return output


@dataclass(frozen=True, eq=False)
class ExtendPrompt(Edit):
    """Two more tokens for every conditioned chunk's cross-attention, and a push for three of its own."""

    key: Tensor = field(default_factory=lambda: randn(1, 2, WIDTH, seed=80))
    value: Tensor = field(default_factory=lambda: randn(1, 2, WIDTH, seed=81))

    def amend(self, call: AttentionCall, sigma: float, recorded: Callable[[Stream], Features | None]) -> None:
        call.extend(self.key, self.value, bias=torch.tensor(0.5))
        call.bias(torch.tensor([1.0, -1.0, 2.0]), tokens=[0, 2, 5])


def extend_prompt(model: Any) -> Any:
    return add_edit(model, ExtendPrompt(frozenset({Site("cross", *PLACE)}), Window()))


OURS: dict[str, Callable[[Any], Any]] = {"attn1": recycled, "attn2": extend_prompt}


def with_adapter(model: Any, slot: str, adapter: Adapter) -> Any:
    clone = model.clone()
    {"attn1": clone.set_model_attn1_replace, "attn2": clone.set_model_attn2_replace}[slot](adapter, *PLACE)
    return clone


def outputs_of(model: Any, slot: str, seen: list[Tensor]) -> Any:
    """A clone that writes down the layer's attention output after its projection, as other packs' patches see it."""

    def keep(output: Tensor, extra: dict[str, Any]) -> Tensor:
        if (*extra["block"], extra["block_index"]) == PLACE:
            seen.append(output.clone())
        return output

    clone = model.clone()
    {"attn1": clone.set_model_attn1_output_patch, "attn2": clone.set_model_attn2_output_patch}[slot](keep)
    return clone


@pytest.mark.parametrize("slot", OURS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_our_amendment_adds_to_another_packs_replacement(slot: str, ours_first: bool, model: Any) -> None:
    adapter, projected = Adapter(), []
    look = Look(frozenset({Site("self" if slot == "attn1" else "cross", *PLACE)}), Window())
    base = outputs_of(add_edit(model, look), slot, projected)
    if ours_first:
        both = with_adapter(OURS[slot](base), slot, adapter)
    else:
        both = OURS[slot](with_adapter(base, slot, adapter))
    result = sample(both, batch=2)
    generation = [call for call in adapter.calls if len(call[0]) == 4]
    projected = [output for output in projected if len(output) == 4]
    assert len(generation) == len(projected) == 2
    block = getattr(model.model.diffusion_model.output_blocks[3][1].transformer_blocks[0], slot)
    for (query, key, value, other), output in zip(generation, projected, strict=True):
        expected = other.double()
        # The calls that our edit saw carry what it amended.
        amended = next(s.call for s in look.of("positive") if torch.equal(s.call.query, query[s.call.chunk.rows]))
        rows, heads = amended.chunk.rows, amended.heads
        plain = dense.attention(query[rows], key[rows], value[rows], heads)
        expected[rows] += (
            dense.attention(query[rows], key[rows], value[rows], heads, amended.own_bias, amended.extensions) - plain
        )
        with torch.inference_mode():
            torch.testing.assert_close(output, block.to_out(expected.float()), rtol=0, atol=1e-5)
    assert difference(result, sample(OURS[slot](model), batch=2)) > FEW
    assert difference(result, sample(with_adapter(model, slot, Adapter()), batch=2)) > FEW


@pytest.mark.parametrize("slot", OURS)
def test_an_untouched_replacement_runs_as_it_is(slot: str, model: Any) -> None:
    other = Site("self" if slot == "attn1" else "cross", "input", 1, 0)
    looked = add_edit(model, Look(frozenset({other}), Window()))
    patched = with_adapter(looked, slot, Adapter())
    assert torch.equal(sample(patched), sample(with_adapter(model, slot, Adapter())))


def test_a_replacement_for_a_whole_block_is_found(model: Any) -> None:
    def whole(target: Any) -> Any:
        clone = target.clone()
        clone.set_model_attn1_replace(Adapter(), *PLACE[:2])
        return clone

    ours, theirs = sample(recycled(model)), sample(whole(model))
    one, other = sample(recycled(whole(model))), sample(whole(recycled(model)))
    assert torch.equal(one, other)
    assert difference(one, ours) > FEW
    assert difference(one, theirs) > FEW


def test_another_packs_attention_function_is_used(model: Any) -> None:
    def sharper(function: Callable[..., Tensor], query: Tensor, *rest: Any, **values: Any) -> Tensor:
        return function(query * 2, *rest, **values)

    def override(target: Any) -> Any:
        clone = target.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = sharper
        return clone

    ours, theirs = sample(recycled(model)), sample(override(model))
    one, other = sample(recycled(override(model))), sample(override(recycled(model)))
    assert torch.equal(one, other)
    assert difference(one, ours) > FEW
    assert difference(one, theirs) > FEW


# A layer whose batch another pack widens, as attention couple does


def test_a_widened_batch_is_left_alone_with_one_warning(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    def couple(target: Any) -> Any:
        clone = target.clone()
        clone.set_model_attn2_patch(lambda q, k, v, extra: (q.repeat(2, 1, 1), k.repeat(2, 1, 1), v.repeat(2, 1, 1)))
        clone.set_model_attn2_output_patch(lambda output, extra: torch.lerp(*output.chunk(2), 0.3))
        return clone

    caplog.set_level(logging.WARNING)
    theirs = sample(couple(model), steps=3)
    assert torch.equal(sample(couple(extend_prompt(model)), steps=3), theirs)
    warnings = [record.getMessage() for record in caplog.records if "Subject Patches" in record.getMessage()]
    assert len(warnings) == 1
    assert "output.3.0" in warnings[0]
    # Where the batch is whole, ours still works.
    assert difference(sample(recycled(couple(model)), steps=3), theirs) > FEW


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


@pytest.mark.parametrize("region", [None, torch.ones(1, 8, 4)], ids=["everywhere", "in a region"])
@pytest.mark.parametrize("name", PATCHES)
def test_with_a_node_of_the_host(name: str, region: Tensor | None, model: Any) -> None:
    theirs = PATCHES[name]
    if region is not None:
        region = torch.cat([region, torch.zeros(1, 8, 4)], 2)
    run = {"batch": 2, "size": (12, 16), "steps": 6}

    def ours(target: Any) -> Any:
        return recycled(target, region_mask=region)

    both = ours(theirs(model))
    result = sample(both, **run)
    assert result.isfinite().all()
    assert torch.equal(sample(theirs(ours(model)), **run), result)
    # With the subject's features from its cache, whatever other picture they were made for.
    again = ours(theirs(model))
    sample(again, **run, seed=6)
    assert torch.equal(sample(again, **run), result)
    assert difference(result, sample(ours(model), **run)) > FEW
    assert difference(result, sample(theirs(model), **run)) > FEW


def test_all_of_them_at_once(model: Any) -> None:
    together = model
    for name in ("PAG", "SAG", "FreeU_V2", "ToMe"):
        together = PATCHES[name](together)
    result = sample(recycled(together), size=(12, 16))
    assert result.isfinite().all()
    assert difference(result, sample(together, size=(12, 16))) > FEW


def test_layers_that_another_pack_skips_lend_nothing(model: Any) -> None:
    # As step caches of other packs do: the whole U-Net is passed over now and then.
    def skipping(executor: Any, x: Tensor, timesteps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(x) if len(x) == 1 else executor(x, timesteps, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", skipping)
    assert torch.equal(sample(recycled(clone)), sample(model))
