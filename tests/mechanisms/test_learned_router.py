"""A trained router: its networks and file, the routes that it gives, and its node's bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from safetensors.torch import load_file
from subject_patches.encoders.loading import kept_by_host
from subject_patches.encoders.router import RouterForm, RouterLayer, inner_products, own_places
from subject_patches.encoders.segmented import segmented
from subject_patches.encoders.subject_encoder import read_subject_encoder, router_modules
from subject_patches.encoders.vision import seen
from subject_patches.nodes.image_prompt import layer_channels
from subject_patches.nodes.router import RouteByEncoderNode
from subject_patches.nodes.subject_encoder import REFERENCES, EncodeSubjectsNode
from subject_patches.patches.mechanisms.attention_maps import resized
from subject_patches.patches.mechanisms.learned_router import LearnedRouter, route_of_logits
from subject_patches.patches.mechanisms.map_router import MapRouter
from subject_patches.patches.mechanisms.subject import Reference, Subject
from subject_patches.patches.parts.prompt import SPANS_KEY
from torch import Tensor

from ..shared.models import (
    difference,
    generator,
    map_router,
    prompt,
    randn,
    routed,
    sample,
    small_model,
    subject,
)
from ..shared.small_vaes import small_vae
from ..shared.subject_encoders import ROUTER_FORM, VISION, encoded_subject, file_for, form_for, learned_router, written

pytestmark = pytest.mark.usefixtures("in_inference_mode")


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("encoder") / "small.safetensors", *file_for(model, routed=True))


@pytest.fixture(scope="module")
def encoder(path: Path) -> Any:
    return read_subject_encoder(path)


def two(model: Any, **values: Any) -> tuple[Subject, ...]:
    return tuple(
        encoded_subject(model, subject(phrase=phrase), number, **values)
        for number, phrase in enumerate(("subject", "scene"))
    )


# The networks


def test_a_subject_reads_where_its_coarse_map_is_highest() -> None:
    logits = torch.tensor([[[3.0, 0.0, 1.0], [1.0, 2.0, 0.0], [0.0, 1.0, 0.5]]])
    assert own_places(logits).tolist() == [[[True, False, True], [False, True, False], [True, True, True]]]


def test_maps_are_projected_inner_products(model: Any) -> None:
    """Coarse and refined, as section 3.3 says, written out for one layer; R' reads its own places alone."""
    form, layer = RouterForm(8, 2), RouterLayer(6, RouterForm(8, 2), comfy.ops.manual_cast)
    for number, each in enumerate(layer.parameters()):
        each.data = randn(*each.shape, seed=number)
    places, features = randn(2, 10, 6, seed=50), randn(2, 3, 8, seed=51)
    coarse, refined = layer(places, features)

    def projected(pair: Any, r: Tensor) -> Tensor:
        z = places @ pair.to_z.weight.T
        return torch.einsum("rpw,rnw->rnp", z, r @ pair.to_r.weight.T) / 8**0.5

    assert torch.allclose(coarse, projected(layer.coarse, features), atol=1e-4)
    read, own = layer.refine, own_places(coarse)
    key, value = read.to_kv(read.norm_z(places)).chunk(2, -1)
    query = read.to_q(read.norm_r(features))
    heads = []
    for head in range(form.heads):
        part = slice(4 * head, 4 * head + 4)
        shares = (query[..., part] @ key[..., part].mT / 2).masked_fill(~own, -torch.inf).softmax(-1)
        heads.append(shares @ value[..., part])
    become = features + read.to_out(torch.cat(heads, -1))
    become = become + read.feed_forward(become)
    assert torch.allclose(refined, projected(layer.refined, become), rtol=1e-3, atol=1e-3)
    assert not torch.equal(refined.argmax(1), coarse.argmax(1))


def test_who_is_not_there_has_no_place() -> None:
    layer = RouterLayer(6, RouterForm(8, 2), comfy.ops.manual_cast)
    for number, each in enumerate(layer.parameters()):
        each.data = randn(*each.shape, seed=number)
    places, features = randn(1, 10, 6, seed=50), randn(1, 3, 8, seed=51)
    present = torch.tensor([[True, False, True]])
    with_another = layer(places, features, present)
    without = layer(places, features[:, [0, 2]])
    for one, other in zip(with_another, without, strict=True):
        assert torch.allclose(one[:, [0, 2]], other, atol=1e-5)
        assert not (one.argmax(1) == 1).any()


def test_inner_products_have_a_row_for_each_feature() -> None:
    assert inner_products(torch.ones(1, 5, 4), torch.ones(1, 3, 4)).tolist() == [[[2.0] * 5] * 3]


# The file


def test_a_router_is_read_as_it_was_written(path: Path, encoder: Any) -> None:
    tensors = load_file(path)
    own = {name.removeprefix("router."): each for name, each in tensors.items() if name.startswith("router.")}
    assert encoder.router.model.state_dict().keys() == own.keys()
    assert all(torch.equal(encoder.router.model.state_dict()[name], each) for name, each in own.items())
    assert "input.1.0.refine.to_kv.weight" in own


FAULTS = {
    "a tensor less": (
        lambda tensors, about: tensors.pop("router.qformer.latents"),
        r"1 of its tensors are missing, router.qformer.latents among them",
    ),
    "another shape": (
        lambda tensors, about: tensors.update({"router.input.1.0.coarse.to_r.weight": torch.zeros(2, 2)}),
        r"it has router.input.1.0.coarse.to_r.weight of shape \[2, 2\] where its sizes ask for \[12, 12\]",
    ),
    "untold": (lambda tensors, about: about.pop("router"), r"of its tensors are unknown, router\.\S+ among them"),
    "strangely told": (
        lambda tensors, about: about.update(router='{"width": 12, "heads": 5}'),
        r"what it says of its router is not whole \(5 heads of 12 channels\)",
    ),
    "without heads": (
        lambda tensors, about: about.update(router='{"width": 12, "heads": 0}'),
        r"what it says of its router is not whole \(0 heads of 12 channels\)",
    ),
    "without an end": (
        lambda tensors, about: about.update(router='{"width": Infinity, "heads": 1}'),
        r"what it says of its router is not whole \(cannot convert float infinity",
    ),
    "half told": (lambda tensors, about: about.update(router="{}"), r"what it says of its router is not whole"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_router_that_is_not_whole_is_refused(model: Any, tmp_path: Path, fault: str) -> None:
    tensors, about = file_for(model, routed=True)
    change, said = FAULTS[fault]
    change(tensors, about)
    with pytest.raises(ValueError, match=rf"'a.safetensors' cannot be loaded as a subject encoder: .*{said}"):
        read_subject_encoder(written(tmp_path / "a.safetensors", tensors, about))


# The nodes


def pictured() -> Subject:
    image, mask = torch.rand(1, 40, 64, 3, generator=generator(0)), torch.zeros(1, 40, 64)
    mask[:, 5:-5, :40] = 1
    reference = Reference(image, randn(1, 4, 5, 8), None, mask, cut_out=True)
    return Subject((reference, replace(reference, image=image.flip(2))), "subject")


def test_a_subject_gets_its_routing_feature(encoder: Any) -> None:
    """Of what the vision model sees of it, the mean of its pictures', and of an empty picture the background's; also
    where its tokens are left out."""
    made = EncodeSubjectsNode.execute((pictured(),), encoder, small_vae(), REFERENCES).args[0][0].encoded
    cut = [
        segmented(each.image, each.pixel_mask, 48, VISION["image_mean"], VISION["image_std"])[0]
        for each in pictured().references
    ]
    features = encoder.router.model.features(seen(encoder.vision, torch.cat([*cut, torch.zeros(1, 3, 48, 48)])))
    assert torch.allclose(made.routing.own, features[:2].mean(0, keepdim=True), atol=1e-5)
    assert torch.allclose(made.routing.background, features[2:], atol=1e-5)
    assert difference(features[:1], features[1:2]) > 1e-3
    without = replace(encoder, router=None)
    assert EncodeSubjectsNode.execute((pictured(),), without, small_vae()).args[0][0].encoded.routing is None


def test_the_vision_model_looks_once(encoder: Any) -> None:
    """At a subject's pictures and at the empty one, for the tokens and the router together."""
    rows: list[int] = []
    hook = encoder.vision.model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["pixel_values"])), with_kwargs=True
    )
    with hook:
        EncodeSubjectsNode.execute((pictured(),), encoder, small_vae())
    assert rows == [len(pictured().references), 1]


def test_the_host_moves_the_router(model: Any, encoder: Any) -> None:
    """It is a model beside the MODEL, once for two nodes, and the given MODEL has none."""
    made = EncodeSubjectsNode.execute((pictured(),), encoder, small_vae()).args[0]
    router = RouteByEncoderNode.execute(encoder).args[0]
    patched = routed(routed(model, made, router), made, router)
    assert [each.model for each in patched.get_nested_additional_models()] == [encoder.router.model]
    assert model.get_nested_additional_models() == []
    assert bool(sample(patched).isfinite().all())


def test_choices_reach_the_router(encoder: Any) -> None:
    plain, chosen = (
        RouteByEncoderNode.execute(encoder, **values).args[0]
        for values in ({}, {"maps": "coarse", "early": "learned maps", "learned_from": 0.7})
    )
    assert (plain.refined, plain.early, plain.learned_from) == (True, MapRouter(), 0.3)
    assert (chosen.refined, chosen.early, chosen.learned_from) == (False, None, 0.7)


def test_what_cannot_be_routed_is_said(model: Any, encoder: Any) -> None:
    """In one sentence each: no router in the file, a subject without a feature or of another encoder, another model,
    and inputs that are no choice."""
    with pytest.raises(ValueError, match=r"The encoder 'small.safetensors' has no router: .* Route Subjects by Atten"):
        RouteByEncoderNode.execute(replace(encoder, router=None))
    router, known = learned_router(model), two(model)
    with pytest.raises(ValueError, match=r"Subject 2 has no routing feature, but the router is that of 'encoder'"):
        routed(model, (known[0], subject()), router)
    with pytest.raises(
        ValueError, match=r"Subject 1 has a routing feature of 'encoder', but .* of 'small.safetensors'"
    ):
        routed(model, known, RouteByEncoderNode.execute(encoder).args[0])
    with pytest.raises(ValueError, match=r"is for a U-Net with 1 cross-attentions, but this model has \d+"):
        routed(model, known, smaller_router(model))
    for values in ({"maps": "best"}, {"early": "none"}, {"learned_from": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(values))} (is|are) "):
            RouteByEncoderNode.execute(encoder, **values)


def smaller_router(model: Any) -> LearnedRouter:
    """A router of a U-Net with one cross-attention."""
    channels = dict(list(layer_channels(model, "cross").items())[:1])
    modules = router_modules(ROUTER_FORM, form_for(model), channels, comfy.ops.manual_cast)
    return LearnedRouter("encoder", kept_by_host(modules))


# What a run does


def by_hand(model: Any, who: tuple[Subject, ...], router: Any) -> Any:
    """The model with replacements of its attentions that go by the router, straight from section 3.3."""
    from subject_patches.patches.families import attention_sites
    from subject_patches.patches.mechanisms.image_prompt import in_file_order

    from ..shared import dense

    patched, sites = model.clone(), attention_sites(model)
    order = in_file_order(site for site in sites if site.kind == "cross")
    network, kept = router.patcher.model, [each.encoded for each in who]
    features = torch.cat([*(each.routing.own for each in kept), kept[0].routing.background])[None]
    last: dict[int, Tensor] = {}

    def route(site: Any) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            outputs = []
            for row, chunk in enumerate(extra["cond_or_uncond"]):
                one = slice(row, row + 1)
                output, heads = dense.attention(q[one], k[one], v[one], extra["n_heads"]).float(), extra["n_heads"]
                prompts = [each.prompt.subject[order.index(site)] for each in kept]
                prompts.append(kept[0].prompt.empty[order.index(site)])
                terms = [dense.attention(q[one], *pair, heads).float() for pair in prompts]
                if chunk == 0:
                    logits = network.maps(site, q[one], features)[int(router.refined)]
                    last[0] = logits.unflatten(-1, tuple(extra["activations_shape"][-2:]))
                    owner = logits.argmax(1)[..., None]
                    output = output + sum(term * (owner == number) for number, term in enumerate(terms))
                else:
                    output = output + terms[-1]
                outputs.append(output)
            return torch.cat(outputs)

        return attend

    def lend(site: Any) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            outputs = []
            for row, chunk in enumerate(extra["cond_or_uncond"]):
                one = slice(row, row + 1)
                key, value, bias = [k[one]], [v[one]], [q.new_zeros(1, q.shape[1], k.shape[1])]
                if chunk == 0 and kept[0].references and site in kept[0].references[0].ready:
                    owner = resized(last[0], tuple(extra["activations_shape"][-2:])).flatten(2).argmax(1)
                    for number, each in enumerate(kept):
                        more = each.references[0].ready[site]
                        unseen = torch.where(owner == number, 0.0, -1e9)[..., None]
                        key.append(more[0]), value.append(more[1])
                        bias.append(unseen.expand(-1, -1, more[0].shape[1]))
                both = torch.cat(key, 1), torch.cat(value, 1)
                outputs.append(dense.attention(q[one], *both, extra["n_heads"], torch.cat(bias, -1)).float())
            return torch.cat(outputs)

        return attend

    for site in sites:
        replaced = route(site) if site.kind == "cross" else lend(site)
        slot = patched.set_model_attn2_replace if site.kind == "cross" else patched.set_model_attn1_replace
        slot(replaced, *site.key)
    return patched


@pytest.mark.parametrize("refined", [True, False])
def test_subjects_are_shown_where_the_router_says(model: Any, refined: bool) -> None:
    """Tokens by the layer's own map, references by that of the cross-attention before, in every layer."""
    who, router = two(model), learned_router(model, refined=refined)
    assert difference(sample(routed(model, who, router)), sample(by_hand(model, who, router))) < 1e-4
    other = replace(router, refined=not refined)
    assert difference(sample(routed(model, who, other)), sample(by_hand(model, who, router))) > 1e-3


def test_attention_maps_go_before_where_noise_is_high(model: Any) -> None:
    """Until `learned_from` as Route Subjects by Attention; never from 0 on; and without phrases, or where the prompt
    does not know each of them, the learned maps from the first step."""
    who = two(model)
    learned, by_maps = sample(routed(model, who, learned_router(model))), sample(routed(model, who, map_router()))
    assert difference(learned, by_maps) > 1e-3

    def result(share: float, who: tuple[Subject, ...] = who, **run: Any) -> Tensor:
        router = learned_router(model, early=MapRouter(), learned_from=share)
        return sample(routed(model, who, router), **run)

    assert torch.equal(result(0.0), learned)
    assert difference(result(1.0), by_maps) < 1e-5
    between = result(0.4)
    assert difference(between, learned) > 1e-4
    assert difference(between, by_maps) > 1e-4
    nameless = tuple(replace(each, phrase="") for each in who)
    assert torch.equal(result(1.0, nameless), learned)
    only_one = prompt(1, **{SPANS_KEY: {who[0].phrase: ((1, 2),)}})
    for untold in ({"positive": prompt(1)}, {"positive": only_one}):
        assert torch.equal(result(1.0, **untold), sample(routed(model, who, learned_router(model)), **untold))


def test_a_route_at_another_grid_is_of_interpolated_logits() -> None:
    logits = randn(2, 3, 4, 6, seed=1)
    assert torch.equal(route_of_logits(logits, (4, 6)), logits.flatten(2).argmax(1))
    assert torch.equal(route_of_logits(logits, (2, 3)), resized(logits, (2, 3)).flatten(2).argmax(1))
