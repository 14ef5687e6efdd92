"""The prompts that an ICO concept is trained with: their words, where they begin, and what learns of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hosting.random_models import generator
from subject_patches.nodes.train_concept import PRESETS
from subject_patches.tests.shared.clips import FAMILIES, small_clip
from subject_patches.tests.shared.concepts import matching_clip
from subject_patches.tests.shared.models import CONTEXT, small_model
from subject_patches.training.concept import ConceptPrompts, hold_start, key_value_weights
from subject_patches.training.concept_words import RARE, SCHEMES, Scheme, template
from subject_patches.training.copies import loaded, with_gradients
from subject_patches.training.text import TextEncoder
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_inference_mode")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_equation_2(family: str, preset: str) -> None:
    scheme = replace(SCHEMES[preset], template=False)
    with with_gradients():
        encoder = TextEncoder(small_clip(family))
        with loaded(encoder.patcher):
            prompts = ConceptPrompts(encoder, "red dog", scheme, 2, torch.Generator().manual_seed(0))
            contexts, pooled = prompts.encode(encoder, [0, 1])
            plain, plain_pooled = encoder.encode(encoder.tokenize(""))
    assert contexts.shape == (2, 77, plain.shape[-1])
    assert pooled.shape == (2, plain_pooled.shape[-1])
    words = encoder.tokenize(f"{scheme.words} red dog".strip())
    fixed = len(scheme.words.split())
    for name in words:
        first, second = prompts.tokens(0)[name][0], prompts.tokens(1)[name][0]
        assert len(first) == len(second) == 77
        concept, mine = prompts.vectors[f"concept.{name}"], prompts.vectors.get(f"picture 0.{name}", ())
        right = [
            words[name][0][0],
            *mine[: scheme.before],
            *words[name][0][1 : 1 + fixed],
            *concept,
            *words[name][0][1 + fixed : 3 + fixed],
            *mine[scheme.before :],
            words[name][0][3 + fixed],
        ]
        for (token, weight), expected in zip(first, right, strict=False):
            assert weight == 1
            if isinstance(expected, Tensor):
                assert torch.equal(token, expected)
            else:
                assert token == expected[0]
        assert [token for token, _ in first[len(right) :]] == [encoder.tokenize("")[name][0][-1][0]] * (77 - len(right))
        # The concept's vectors are every picture's, its own are not.
        place = 1 + scheme.before + fixed
        assert all(torch.equal(second[place + n][0], concept[n]) for n in range(scheme.concept))
        assert len(concept) == scheme.concept
        assert len(mine) == scheme.before + scheme.after
        assert not scheme.before or not torch.equal(first[1][0], second[1][0])


def test_the_papers_presets() -> None:
    counts = {name: (s.before, s.after, s.concept) for name, s in SCHEMES.items()}
    assert counts["plain"] == (4, 2, 2)
    assert counts["for dual-branch"] == (1, 1, 3)
    assert tuple(SCHEMES) == PRESETS


def test_what_learns_and_what_does_not() -> None:
    with with_gradients():
        encoder = TextEncoder(matching_clip())
        with loaded(encoder.patcher):
            prompts = ConceptPrompts(encoder, "dog", SCHEMES["plain"], 3, torch.Generator().manual_seed(0))
            context, _ = prompts.encode(encoder, [0, 2])
            context.square().mean().backward()
    learnt = {name for name, vectors in prompts.vectors.items() if vectors.grad is not None}
    assert learnt == {"concept.l", "picture 0.l", "picture 2.l"}
    assert all(each.grad is None for each in encoder.model.parameters())
    with with_gradients():
        network = small_model().model.diffusion_model
        weights = key_value_weights(network)
    cross = [name for name, _ in network.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert list(weights) == cross
    assert len(weights) == 2 * 7


def begun(scheme: Scheme, family: str = "SD 1.x") -> tuple[ConceptPrompts, dict[str, Tensor]]:
    """The prompts of two pictures, and the vocabulary of each encoder."""
    with with_gradients():
        encoder = TextEncoder(small_clip(family))
        with loaded(encoder.patcher):
            prompts = ConceptPrompts(encoder, "dog", scheme, 2, torch.Generator().manual_seed(0))
            inner = {name: getattr(encoder.model, f"clip_{name}").transformer for name in prompts.frame}
            return prompts, {name: each.get_input_embeddings().weight.float() for name, each in inner.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_words_begin_as_in_the_authors_code(family: str) -> None:
    """The pictures' as "A photo of a" and ". .", the concept's as the vocabulary's numbers that the code has."""
    prompts, vocabularies = begun(SCHEMES["plain"], family)
    numbers = small_clip(family).tokenize("A photo of a . .")
    for name, vocabulary in vocabularies.items():
        words = vocabulary[[token for token, _ in numbers[name][0][1:7]]]
        assert torch.equal(prompts.vectors[f"picture 0.{name}"], words)
        assert torch.equal(prompts.vectors[f"picture 1.{name}"], words)
        assert torch.equal(prompts.vectors[f"concept.{name}"], vocabulary[[47629, 42170]])
    prompts, vocabularies = begun(SCHEMES["for dual-branch"])
    assert torch.equal(prompts.vectors["concept.l"], vocabularies["l"][[43514, 47629, 42170]])
    assert template(1, 1) == "a ."
    assert template(2, 0) == "photo of"
    assert template(3, 2) == "photo of a . ."
    assert template(6, 1) == ". . a photo of a ."
    assert len(RARE) == len(set(RARE)) == 3


def test_words_begin_at_random_and_as_the_noun() -> None:
    scheme = Scheme(6, 3, 4, template=False, rare=False)
    prompts, vocabularies = begun(scheme)
    ((token, _),) = prompts.noun["l"]
    assert torch.equal(prompts.vectors["concept.l"], vocabularies["l"][token].repeat(4, 1))
    first, second = (prompts.vectors[f"picture {number}.l"] for number in (0, 1))
    assert len(first) == 9
    assert not torch.equal(first, second)


def test_the_start_token_is_held() -> None:
    """Its keys and values are what the weights make of them, but give the weights no gradient; all others do."""
    with with_gradients():
        found = []
        for held in (False, True):
            network = small_model().model.diffusion_model
            if held:
                hold_start(network)
            weights = key_value_weights(network)
            layers = {name: network.get_submodule(name.removesuffix(".weight")) for name in weights}
            context = torch.randn(2, 5, CONTEXT, generator=generator(4))
            outputs = {name: layer(context) for name, layer in layers.items()}
            sum(each.square().sum() for each in outputs.values()).backward()
            found.append(({n: each.detach() for n, each in outputs.items()}, {n: w.grad for n, w in weights.items()}))
        free, held = found
        assert len(free[0]) == 14
        for name, output in free[0].items():
            assert torch.equal(output, held[0][name])
            start = 2 * torch.einsum("bo,bi->oi", output[:, 0], context[:, 0])
            torch.testing.assert_close(free[1][name] - start, held[1][name])
