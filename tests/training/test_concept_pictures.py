"""The pictures that an ICO concept is trained with: regularising, mirrored ones and versions; what a preset leaves."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hosting.random_models import generator
from subject_patches.nodes.concept_inputs import Further
from subject_patches.nodes.train_concept import VERSIONS
from subject_patches.tests.shared.concepts import latents, matching_clip, others, pictures, trained
from subject_patches.tests.shared.models import CONTEXT, small_model
from subject_patches.training.concept import ConceptPrompts
from subject_patches.training.concept_run import Shots
from subject_patches.training.concept_words import SCHEMES, Scheme
from subject_patches.training.copies import loaded, with_gradients
from subject_patches.training.denoising import Denoiser
from subject_patches.training.images import varied, with_mirrored
from subject_patches.training.regularisation import regularised
from subject_patches.training.text import TextEncoder
from subject_patches.training.usual import UsualWords

pytestmark = pytest.mark.usefixtures("in_inference_mode")


def test_half_of_a_step_is_for_regularisation() -> None:
    source = torch.Generator().manual_seed(0)
    assert {regularised(4, source) for _ in range(20)} == {2}
    assert {regularised(1, source) for _ in range(20)} == {0, 1}
    assert {regularised(3, source) for _ in range(20)} == {1, 2}


def test_regularisation_pictures_have_their_own_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step of four two are the concept's, with prompts that learn, and two others, with captions that do not."""
    seen = []
    monkeypatch.setattr(Denoiser, "loss", lambda self, *args: seen.append(args[:3]) or args[1].sum())
    with with_gradients():
        clip = matching_clip()
        encoder, denoiser = TextEncoder(clip), Denoiser(small_model(), torch.float32, False)
        with loaded(encoder.patcher, denoiser.patcher):
            prompts = ConceptPrompts(encoder, "dog", SCHEMES["plain"], 3, torch.Generator().manual_seed(0))
            Shots(denoiser, encoder, prompts, latents(), others()).loss(4, torch.Generator().manual_seed(1)).backward()
            captions = torch.cat([encoder.encode(encoder.tokenize(each))[0] for each in others().captions])
    ((shown, contexts, pooled),) = seen
    assert shown.shape == (4, 4, 8, 8)
    assert contexts.shape == (4, 77, CONTEXT)
    assert pooled.shape[0] == 4
    for row in (0, 1):
        assert any(torch.equal(shown[row], each) for each in latents().flatten(0, 1))
    for row in (2, 3):
        (number,) = [n for n, each in enumerate(others().latents) if any(torch.equal(shown[row], v) for v in each)]
        assert torch.equal(contexts[row], captions[number])
    assert prompts.vectors["concept.l"].grad is not None


def test_regularisation_changes_what_is_learnt() -> None:
    plain, beside, again = trained(2), trained(2, others=others()), trained(2, others=others())
    assert beside.losses == again.losses
    assert beside.losses != plain.losses


def test_the_mirror() -> None:
    picture = pictures(1)
    first, second = with_mirrored([picture])
    assert torch.equal(first, picture)
    assert torch.equal(second, picture[:, :, torch.arange(63, -1, -1)])


def test_what_is_left_to_the_model_and_the_preset() -> None:
    plain, written = SCHEMES["plain"], SCHEMES["fixed template"]
    real, toys = UsualWords(True, True, True, True), UsualWords(False, False, False, False)
    left = Further().settled(plain, real)
    assert left.scheme(plain) == plain
    assert (left.mirrored, left.start_token) == ("half the time", "held")
    left = Further().settled(written, toys)
    assert left.scheme(written) == replace(written, template=False, rare=False)
    assert (left.mirrored, left.start_token) == ("never", "trained")
    given = Further(words_before=6, concept_words=1, picture_words_begin="at random", mirrored="never")
    given = given.settled(plain, real)
    assert given.scheme(plain) == Scheme(6, 2, 1, template=False)
    assert (given.mirrored, given.start_token) == ("never", "held")


def test_versions_of_a_picture() -> None:
    picture = pictures(1)
    versions = varied(picture, VERSIONS, 0.5, 0.1, generator(3))
    assert len(versions) == VERSIONS
    assert torch.equal(versions[0], picture)
    assert {tuple(each.shape) for each in versions} == {(1, 64, 64, 3)}
    assert all(float(each.min()) >= 0 and float(each.max()) <= 1 for each in versions)
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(versions))
    still = varied(torch.full((1, 32, 32, 3), 0.5), 4, 0.5, 0.0, generator(3))
    torch.testing.assert_close(torch.stack(still), torch.full((4, 1, 32, 32, 3), 0.5))
