"""What the layers of a run make of a subject that an encoder has seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from subject_patches.nodes.routed_reference import SubjectShareNode
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.image_prompt import in_file_order
from subject_patches.patches.mechanisms.subject import Share, Subject
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from torch import Tensor

from ..shared.dit_models import dit_model
from ..shared.models import CONTEXT, difference, map_router, prompt, recycled, routed, sample, small_model, subject
from ..shared.subject_encoders import encoded_subject

pytestmark = pytest.mark.usefixtures("in_inference_mode")


def by_hand(model: Any, who: Subject, *, strength: float = 1.0, eta: float = 1.0, share: Tensor | None = None) -> Any:
    """The model with dense replacements of its attentions, straight from Eq. 4 to 7: the conditioned rows see the kept
    keys and values and the tokens, the unconditional ones the empty picture's tokens."""
    encoded, patched = who.encoded, model.clone()
    sites = attention_sites(model)
    order = in_file_order(site for site in sites if site.kind == "cross")

    def weight(grid: list[int], like: Tensor) -> Tensor:
        if share is None:
            return like.new_ones(1, grid[-2] * grid[-1], 1)
        return torch.nn.functional.interpolate(share[:, None], grid[-2:], mode="area").flatten(2).mT

    def own(site: Any) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            outputs = []
            for number, chunk in enumerate(extra["cond_or_uncond"]):
                rows = slice(number, number + 1)
                key, value = k[rows], v[rows]
                if chunk == 0 and encoded.references and site in encoded.references[0].ready:
                    more = encoded.references[0].ready[site]
                    bias = (strength * weight(extra["activations_shape"], q)).log().expand(-1, -1, more[0].shape[1])
                    bias = torch.cat([bias.new_zeros(1, bias.shape[1], key.shape[1]), bias], -1)
                    key, value = torch.cat([key, more[0]], 1), torch.cat([value, more[1]], 1)
                    outputs.append(dense.attention(q[rows], key, value, extra["n_heads"], bias).float())
                else:
                    outputs.append(dense.attention(q[rows], key, value, extra["n_heads"]).float())
            return torch.cat(outputs)

        return attend

    def told_of(site: Any) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            outputs = []
            for number, chunk in enumerate(extra["cond_or_uncond"]):
                rows, heads = slice(number, number + 1), extra["n_heads"]
                output = dense.attention(q[rows], k[rows], v[rows], heads).float()
                if encoded.prompt is not None:
                    pairs = encoded.prompt.subject if chunk == 0 else encoded.prompt.empty
                    term = dense.attention(q[rows], *pairs[order.index(site)], heads).float()
                    here = weight(extra["activations_shape"], q) if chunk == 0 else 1.0
                    output = output + eta * here * term
                    if chunk == 0:
                        rest = dense.attention(q[rows], *encoded.prompt.empty[order.index(site)], heads).float()
                        output = output + eta * (1 - here) * rest
                outputs.append(output)
            return torch.cat(outputs)

        return attend

    for site in sites:
        if site.kind == "self":
            patched.set_model_attn1_replace(own(site), *site.key)
        else:
            patched.set_model_attn2_replace(told_of(site), *site.key)
    return patched


@pytest.mark.parametrize("parts", ["both", "tokens", "references"])
def test_recycling_shows_an_encoded_subject(model: Any, parts: str) -> None:
    """As the equations written out: everywhere, in all layers that the encoder is for, without a pass over the
    reference."""
    who = encoded_subject(model, subject(), parts=parts)
    assert difference(sample(recycled(model, (who,))), sample(by_hand(model, who))) < 1e-4


def test_strength_and_region_weigh_an_encoded_subject(model: Any) -> None:
    """A strength below one weakens its tokens, too, and so does a grey region, place by place."""
    who = encoded_subject(model, subject())
    region = torch.full((1, 8, 8), 0.25)
    region[:, :, 4:] = 1.0
    patched = recycled(model, (who,), strength=0.5, region_mask=region)
    assert difference(sample(patched), sample(by_hand(model, who, strength=0.5, eta=0.5, share=region))) < 1e-4
    double = recycled(model, (who,), strength=2.0)
    assert difference(sample(double), sample(by_hand(model, who, strength=2.0))) < 1e-4


def test_routing_shows_encoded_subjects_in_their_places(model: Any) -> None:
    """One subject that has every place is shown as recycling shows it; of two, each in its own, and an image prompt of
    Subject Share goes before the encoder's tokens."""
    from subject_patches.nodes.router import RouteByMasksNode

    who = encoded_subject(model, subject())
    whole = RouteByMasksNode.execute(masks=torch.ones(1, 8, 8)).args[0]
    assert difference(sample(routed(model, (who,), whole)), sample(recycled(model, (who,)))) < 1e-4
    other = encoded_subject(model, subject(phrase="scene"), seed=1)
    both = sample(routed(model, (who, other), map_router()))
    assert bool(both.isfinite().all())
    # In another order each is where its phrase is, all the same; with the other's look it is not.
    assert difference(sample(routed(model, (other, who), map_router())), both) < 1e-4
    traded = replace(who, encoded=other.encoded), replace(other, encoded=who.encoded)
    assert difference(sample(routed(model, traded, map_router())), both) > 1e-3


def test_a_share_holds_for_the_empty_pictures_tokens_too(model: Any) -> None:
    """A subject that shows none of its tokens brings none of an empty picture; its eta and window are the empty
    picture's as the node's own would be."""
    who = encoded_subject(model, subject())

    def shared(**values: Any) -> Subject:
        return replace(who, share=Share(**values))

    assert torch.equal(sample(routed(model, (shared(strength=0.0, eta=0.0),))), sample(model))
    for own, node in (({"eta": 0.5}, {"eta": 0.5}), ({"window": Window(0.0, 0.4)}, {"end_percent": 0.4})):
        weak = sample(routed(model, (shared(**own),)), steps=4)
        assert torch.equal(weak, sample(routed(model, (who,), **node), steps=4))
        assert difference(weak, sample(routed(model, (who,)), steps=4)) > 1e-4
    # Of several, those that show theirs.
    silent = replace(encoded_subject(model, subject(phrase="scene"), seed=1), share=Share(0.0, eta=0.0))
    nobody = subject(phrase="scene", strength=0.0)
    weak = shared(eta=0.5)
    assert torch.equal(sample(routed(model, (weak, silent))), sample(routed(model, (weak, nobody))))


def test_sites_hold_for_a_text_beside_an_encoders_tokens(model: Any) -> None:
    """An image prompt, or the background's, acts in the layers that are chosen, whoever else has trained ones."""
    encoded = encoded_subject(model, subject(), parts="tokens")
    silent, nobody = replace(encoded, share=Share(0.0, eta=0.0)), subject(strength=0.0)
    text = SubjectShareNode.execute((subject(phrase="scene"),), 0.0, image_prompt=prompt(3)).args[0]

    def shown(who: Subject, sites: str) -> Tensor:
        return sample(routed(model, (who, *text), sites=sites, background_prompt=prompt(4)))

    assert difference(shown(encoded, "encoder"), shown(encoded, "decoder")) > 1e-4
    assert torch.equal(shown(silent, "decoder"), shown(nobody, "decoder"))


def test_an_encoded_subject_beside_a_plain_one(model: Any) -> None:
    """Each is shown in the layers that are usual for it, and the plain one as without the other."""
    plain, who = subject(seed=4), encoded_subject(model, subject(), parts="references")
    together = sample(recycled(model, (plain, who)))
    chained = sample(recycled(recycled(model, (plain,)), (who,)))
    assert torch.equal(together, chained)


def test_two_encoded_subjects_are_shown_by_one_node_as_by_two(model: Any) -> None:
    """The empty picture's tokens weigh as much against theirs, in the unconditional pass and outside a region."""
    one, other = (encoded_subject(model, subject(), seed=seed, parts="tokens") for seed in (0, 1))
    region = torch.zeros(1, 8, 8)
    region[:, :, :4] = 1
    together = sample(recycled(model, (one, other), region_mask=region))
    chained = sample(recycled(recycled(model, (one,), region_mask=region), (other,), region_mask=region))
    assert difference(together, chained) < 1e-5


def test_an_encoder_of_another_family_is_refused(model: Any) -> None:
    """By both nodes, of other U-Nets and of transformers."""
    other = small_model(in_channels=4)
    who = encoded_subject(model, subject())
    kept = who.encoded.references[0]
    fewer = replace(kept, ready=dict(list(kept.ready.items())[1:]))
    # SD 2.x has the layers of SD 1.x, and prompts of another width.
    newer = replace(kept, context=2 * CONTEXT)
    wide = replace(who.encoded.prompt, context=2 * CONTEXT)
    wrong = {
        r"was encoded by 'encoder' for the tests, \d+ layers of up to 64 channels": {"references": (fewer,)},
        rf"prompts of {2 * CONTEXT}, but this model .* and prompts of {CONTEXT}": {"references": (newer,)},
        rf"is for prompts of {2 * CONTEXT} channels .* this model's prompts have {CONTEXT}": {"prompt": wide},
    }
    for node in (recycled, routed):
        for said, changed in wrong.items():
            with pytest.raises(ValueError, match=said):
                node(other, (replace(who, encoded=replace(who.encoded, **changed)),))
        with pytest.raises(ValueError, match="Take Encode Subjects or Encode Image Prompt out of the subject's way"):
            node(dit_model("FLUX.1"), (replace(who, encoded=replace(who.encoded, prompt=None)),))
