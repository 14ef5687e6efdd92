"""The text encoder in a training: what it encodes is the host's, and its gradients are right."""

from __future__ import annotations

import comfy.sd
import pytest
import torch
from hosting.random_models import generator
from subject_patches.nodes.training_inputs import check_learns
from subject_patches.tests.shared.clips import ENCODERS, FAMILIES, SMALL, small_clip
from subject_patches.tests.shared.models import CONTEXT, small_model
from subject_patches.training.copies import loaded, with_gradients
from subject_patches.training.text import TextEncoder
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_inference_mode")

PROMPT = "a dog on the beach"


@pytest.mark.parametrize("family", ["Chroma", "FLUX.1"])
def test_words_of_contextual_encoders_are_refused(family: str) -> None:
    encoders = ENCODERS[family]
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = encoders.tokenizer(), {}
    with pytest.raises(ValueError, match=r"but this CLIP has t5xxl: what T5 or a language model"):
        check_learns(small_model(), clip)
    check_learns(small_model(), small_clip("SD 1.x", hidden_size=CONTEXT))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [PROMPT, "a (red:1.3) dog", "so " * 80 + "dog"])
def test_the_copy_encodes_as_the_host_does(family: str, text: str) -> None:
    clip = small_clip(family)
    plain, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    with with_gradients():
        encoder = TextEncoder(clip)
        with loaded(encoder.patcher):
            context, own_pooled = encoder.encode(encoder.tokenize(text))
    assert torch.equal(context, plain)
    assert torch.equal(own_pooled, pooled)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_hosts_encoder(family: str) -> None:
    """Against differences of what the encoder gives, in the direction of the gradient, for every weight that counts."""
    with with_gradients():
        encoder = TextEncoder(small_clip(family))
        with loaded(encoder.patcher):
            trained = encoder.train_weights()
            weight = torch.randn(encoder.encode(encoder.tokenize(PROMPT))[0].shape, generator=generator(1))

            def value() -> Tensor:
                return (encoder.encode(encoder.tokenize(PROMPT))[0] * weight).sum()

            gradients = torch.autograd.grad(value(), list(trained.values()))
            norm = torch.stack([each.square().sum() for each in gradients]).sum().sqrt()
            small = 1e-2
            measured = []
            for sign in (1, -1):
                with torch.no_grad():
                    for parameter, gradient in zip(trained.values(), gradients, strict=True):
                        parameter += sign * small * gradient / norm
                    measured.append(value())
                    for parameter, gradient in zip(trained.values(), gradients, strict=True):
                        parameter -= sign * small * gradient / norm
    assert float(measured[0] - measured[1]) / (2 * small) == pytest.approx(float(norm), rel=1e-2)
    # SD 2.x and SDXL take the last layer but one.
    layers = {name.split("layers.")[1].split(".")[0] for name in trained if "layers." in name}
    assert layers == ({"0", "1", "2"} if family == "SD 1.x" else {"0", "1"})
    assert not any("text_projection" in name or "logit" in name for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_prompts_in_one_pass(family: str) -> None:
    with with_gradients():
        encoder = TextEncoder(small_clip(family))
        with loaded(encoder.patcher):
            prompts = [encoder.tokenize(text) for text in (PROMPT, "a cat", "")]
            together = encoder.encode_all(prompts)
            for row, tokens in zip(together, prompts, strict=True):
                torch.testing.assert_close(row, encoder.encode(tokens)[0][0])


def test_vectors_in_place_of_words_learn() -> None:
    with with_gradients():
        encoder = TextEncoder(small_clip("SD 1.x"))
        with loaded(encoder.patcher):
            word = torch.zeros(SMALL["hidden_size"], requires_grad=True)
            ((first, *_, last),) = encoder.tokenize("")["l"]
            context, _ = encoder.encode({"l": [[first, (word, 1.0), (word, 1.0), *[last] * 74]]})
            context.sum().backward()
    assert word.grad is not None
    assert bool(word.grad.any())
