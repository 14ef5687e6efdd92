"""AnyLogo's tuning: what is trained is what the host and the nodes run, and Eq. 4 and 5 as they are trained."""

from __future__ import annotations

from typing import Any

import comfy.sd
import pytest
import torch
from subject_patches.encoders.semantic_injection import hierarchy
from subject_patches.patches.families import attention_sites
from subject_patches.patches.families.unet import scales
from subject_patches.patches.mechanisms.recycled_attention import extended_attention
from subject_patches.patches.mechanisms.semantic_injection import grouped, tokens_of
from subject_patches.patches.parts.sites import Site, select_sites
from subject_patches.tests.shared.models import CONTEXT, difference, inputs_of, randn, sample, small_model, subject
from subject_patches.tests.shared.semantics import FEATURES, semantics_for, told, vision
from subject_patches.training.symbiotic import (
    ABSENT,
    KEEP,
    LowRanks,
    SemanticModule,
    attention,
    drawn_rows,
    kept_layers,
    recording,
    recycling,
    sparse_bias,
    telling,
)
from torch import Tensor


def called(network: Any, seed: int, **slots: Any) -> Tensor:
    """One call of a U-Net with patches in the host's slots."""
    options = {"patches_replace": slots}
    steps = torch.tensor([300.0, 300.0])
    return network(randn(2, 4, 8, 8, seed=seed), steps, context=randn(1, 7, CONTEXT).expand(2, -1, -1),
                   transformer_options=options)  # fmt: skip


def test_low_ranks_are_the_lora_that_the_host_loads(model: Any) -> None:
    """At first nothing, bit for bit; trained, the U-Net with the file in the host's LoRA loader; taken off, nothing."""
    network = model.model.diffusion_model
    plain = called(network, 1)
    torch.manual_seed(0)
    low_ranks = LowRanks(network, 3)
    handles = low_ranks.attach(network)
    assert torch.equal(called(network, 1), plain)
    for each in low_ranks.layers:
        # Numbers that half precision has, too.
        each.down.weight.data = each.down.weight.data.half().float()
        each.up.weight.data = (torch.randn(each.up.weight.shape) * 0.05).half().float()
    trained = called(network, 1).detach()
    assert difference(trained, plain) > 1e-2
    by_hooks = sample(model, steps=1).detach()
    for handle in handles:
        handle.remove()
    assert torch.equal(called(network, 1), plain)
    loaded, _ = comfy.sd.load_lora_for_models(small_model(), None, low_ranks.file(), 1.0, 0.0)
    assert len(loaded.patches) == len(low_ranks.names)
    assert difference(sample(loaded, steps=1), by_hooks) < 1e-3


def test_tokens_are_trained_as_the_node_shows_them(model: Any) -> None:
    """The node's patched U-Net, against the training's call of it with the same tokens, of which the background's is
    hidden in one row."""
    network, (one,) = model.model.diffusion_model, (subject(),)
    semantics = semantics_for(model)
    scene = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(5))
    results: list[Tensor] = []
    hook = network.register_forward_hook(lambda _, args, output: results.append(output.clone()))
    with inputs_of(model) as inputs:
        sample(told(model, (one,), background=scene), steps=1, cfg=1.0)
        sample(told(model, (one,)), steps=1, cfg=1.0)
    hook.remove()
    groups = grouped(attention_sites(model), scales(network))
    seen, behind = hierarchy(vision(), one.references[0].image, None), hierarchy(vision(), scene, None)
    tokens = tokens_of(semantics.maps, [seen], behind)
    x, steps, context = (torch.cat([each[name] for each in inputs]) for name in ("x", "timesteps", "context"))
    rows = {name: torch.tensor([True, other]) for name, other in (("told", True), ("background", False))}
    slots = telling(network, {g: each.expand(2, -1, -1) for g, each in tokens.items()}, groups, **rows)
    made = network(x, steps, context=context, transformer_options={"patches_replace": slots})
    assert difference(made, torch.cat(results)) < 1e-4


def test_modules_make_the_tokens_that_a_file_makes() -> None:
    module = SemanticModule((2, 0, 3, 1), FEATURES, 5)
    assert module.groups == (0, 1, 2, 3)
    seen = tuple((randn(1, 4, FEATURES, seed=n), randn(1, FEATURES, seed=9 + n)) for n in range(4))
    behind = [whole for _, whole in seen]
    assert all(float(each.detach().abs().max()) == 0 for each in module(seen, behind).values())
    for each in module.maps:
        torch.nn.init.normal_(each.weight)
    by_file = tokens_of(module.tensors(), [seen], seen)
    assert all(torch.allclose(each, by_file[group]) for group, each in module(seen, behind).items())


def test_recycling_is_equation_4_over_what_is_inside_and_kept() -> None:
    query, key, value = randn(2, 6, 8, seed=1), randn(2, 6, 8, seed=2), randn(2, 6, 8, seed=3)
    site = Site("self", "middle", 0, 0)
    lent: dict[Site, tuple[Tensor, Tensor]] = {}
    extra = {"n_heads": 2}
    record = recording([site], lent)["attn1"][site.key]
    other = randn(2, 5, 8, seed=4), randn(2, 5, 8, seed=5)
    # Its caller sets gradients back.
    with torch.enable_grad():
        record(randn(2, 5, 8, seed=6), *other, extra)
    assert lent[site][0] is other[0]
    # Computed again in a backward pass, a layer lends nothing new.
    record(query, key, value, extra)
    assert lent[site][0] is other[0]
    inside = torch.tensor([[True, True, False, False, True]] * 2)
    bias = {site: sparse_bias(inside, torch.tensor([True, False]))}
    made = recycling(lent, bias)["attn1"][site.key](query, key, value, extra)
    shown = [other[0][:1, inside[0]], other[1][:1, inside[0]]]
    wanted = extended_attention(query[:1], [key[:1], shown[0]], [value[:1], shown[1]], 2)
    assert torch.allclose(made[:1], wanted, atol=1e-6)
    assert torch.allclose(made[1:], attention(query, key, value, 2)[1:], atol=1e-6)
    assert float(bias[site].min()) == ABSENT


def test_gradients_go_through_the_references_pass(model: Any) -> None:
    """Through both, or through the generation's alone."""
    network = model.model.diffusion_model
    sites = select_sites(attention_sites(model), "self", "decoder")
    low_ranks = LowRanks(network, 2)
    handles = low_ranks.attach(network)
    gradients = []
    for through in (True, False):
        lent: dict[Site, tuple[Tensor, Tensor]] = {}
        with torch.set_grad_enabled(through):
            unused = called(network, 3, **recording(sites, lent))
        assert lent.keys() == sites
        assert all(key.requires_grad == through for key, _ in lent.values())
        # Nothing asks for what comes after the last of them.
        assert not unused.requires_grad
        bias = {site: sparse_bias(torch.ones(key.shape[:2], dtype=torch.bool), torch.ones(2, dtype=torch.bool))
                for site, (key, _) in lent.items()}  # fmt: skip
        called(network, 4, **recycling(lent, bias)).square().mean().backward()
        gradients.append(torch.cat([each.up.weight.grad.flatten() for each in low_ranks.layers]))
        low_ranks.zero_grad()
    for handle in handles:
        handle.remove()
    assert all(bool(each.isfinite().all()) and float(each.abs().max()) > 0 for each in gradients)
    assert difference(*gradients) > 1e-3


def test_rows_and_layers_are_drawn_as_often_as_said() -> None:
    rows = drawn_rows(20000, torch.Generator().manual_seed(0))
    blocked = ~rows["tokens"] & ~rows["reference"]
    assert float(rows["unconditional"].float().mean()) == pytest.approx(0.1, abs=0.02)
    assert not bool((rows["unconditional"] & (rows["tokens"] | rows["reference"])).any())
    assert 0.2 < float(blocked.float().mean()) < 0.3
    sites = [Site("self", "output", number, 0) for number in range(3)]
    kept = kept_layers(sites, rows["reference"], KEEP, torch.Generator().manual_seed(1))
    for each in kept.values():
        assert float(each[rows["reference"]].float().mean()) == pytest.approx(KEEP, abs=0.02)
        assert not bool(each[~rows["reference"]].any())
    # Each layer by itself.
    assert not torch.equal(kept[sites[0]], kept[sites[1]])
