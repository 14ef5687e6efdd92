"""What every training shares: private copies, the encoder's and the denoiser's gradients, and the steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_train import LossGraphNode
from hosting.random_models import generator
from subject_patches.nodes.training_inputs import check_learns
from subject_patches.tests.shared.clips import ENCODERS, FAMILIES, SMALL, small_clip
from subject_patches.tests.shared.models import CONTEXT, sample, small_model
from subject_patches.tests.shared.small_vaes import noting_vae, small_vae
from subject_patches.training.copies import loaded, private_copy, with_gradients
from subject_patches.training.denoising import Denoiser
from subject_patches.training.images import latents_of, pictures_of, square
from subject_patches.training.loop import Group, Training, compute_dtype
from subject_patches.training.state import StateFile
from subject_patches.training.text import TextEncoder
from torch import Tensor

pytestmark = pytest.mark.usefixtures("in_inference_mode")

PROMPT = "a dog on the beach"


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def weights_of(patcher: Any) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in patcher.model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# The text encoder


@pytest.mark.parametrize("family", ["Chroma", "FLUX.1"])
def test_words_of_contextual_encoders_are_refused(family: str) -> None:
    encoders = ENCODERS[family]
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer, clip.tokenizer_options = encoders.tokenizer(), {}
    with pytest.raises(ValueError, match=r"but this CLIP has t5xxl: what T5 or a language model"):
        check_learns(small_model(), clip)
    check_learns(small_model(), small_clip("SD 1.x"))


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


# The denoising loss


@pytest.mark.parametrize("as_v", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
def test_the_loss_is_that_of_what_the_model_predicts_or_of_v(prediction: str, as_v: bool) -> None:
    model = ModelSamplingDiscrete().patch(small_model(), prediction, False)[0]
    latents = torch.randn(3, 4, 8, 6, generator=generator(1))
    context = torch.randn(1, 7, CONTEXT, generator=generator(2))
    with with_gradients():
        denoiser = Denoiser(model, torch.float32, False, as_v)
        latents, context = latents.clone(), context.clone()
        with loaded(denoiser.patcher):
            loss = denoiser.loss(latents, context, None, generator(3))
            inner = denoiser.patcher.model
            source = generator(3)
            steps = torch.randint(1000, (3,), generator=source)
            noise = torch.randn(latents.shape, generator=source)
            # Stable Diffusion's own words: x_t = alpha x + sigma noise, v = alpha noise - sigma x.
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            alpha = torch.cumprod(1 - betas, 0).sqrt()[steps].float()[:, None, None, None]
            sigma = (1 - alpha**2).sqrt()
            clean = latents * 0.18215
            predicted = inner.diffusion_model(alpha * clean + sigma * noise, steps.float(), context.repeat(3, 1, 1))
            if prediction == "eps" and as_v:
                noisy = alpha * clean + sigma * noise
                predicted = alpha * predicted - sigma * (noisy - sigma * predicted) / alpha
            target = noise if prediction == "eps" and not as_v else alpha * noise - sigma * clean
            expected = (predicted - target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def gradient_of_context(model: Any, dtype: torch.dtype, checkpointing: bool) -> tuple[float, Tensor]:
    with with_gradients():
        denoiser = Denoiser(model, dtype, checkpointing)
        context = torch.randn(1, 7, CONTEXT, generator=generator(2)).requires_grad_()
        latents = torch.randn(1, 4, 8, 8, generator=generator(1))
        with loaded(denoiser.patcher), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = denoiser.loss(latents, context, None, generator(3))
            loss.backward()
        assert context.grad is not None
        return float(loss.detach()), context.grad


def test_checkpointing_changes_nothing() -> None:
    with torch.inference_mode():
        model = small_model()
    plain, gradient = gradient_of_context(model, torch.float32, False)
    kept, same = gradient_of_context(model, torch.float32, True)
    assert kept == plain
    torch.testing.assert_close(same, gradient)
    assert bool(gradient.any())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_precision(dtype: torch.dtype, tolerance: float, checkpointing: bool) -> None:
    model = small_model()
    plain, gradient = gradient_of_context(model, torch.float32, False)
    half, rough = gradient_of_context(model, dtype, checkpointing)
    assert half == pytest.approx(plain, rel=tolerance)
    assert float((rough - gradient).norm() / gradient.norm()) < tolerance


def test_a_precision_of_the_hosts_choice() -> None:
    assert compute_dtype("auto", torch.device("cpu")) == torch.float32
    assert compute_dtype("fp16", torch.device("cpu")) == torch.float16


# Copies


def cancelled(model: Any, clip: Any) -> list[weakref.ref[Any]]:
    """Trains copies of both until somebody presses cancel; gives references to the copies."""
    encoder, denoiser = TextEncoder(clip), Denoiser(model, torch.float32, True)
    with loaded(encoder.patcher, denoiser.patcher):
        training = Training([Group(encoder.train_weights(), 0.1)], device=denoiser.device, dtype=torch.float32, seed=0)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            training.run(10, interrupted(3, lambda source: noisy_loss(encoder, source)))
    assert training.step == 2
    return [weakref.ref(each) for each in (encoder.patcher.model, denoiser.patcher.model)]


def test_the_given_models_stay_as_they_are_and_the_copies_go() -> None:
    model, clip = small_model(), small_clip("SD 1.x")
    before, picture = (weights_of(model), weights_of(clip.patcher)), sample(model)
    random = torch.random.get_rng_state()
    with with_gradients():
        gone = cancelled(model, clip)
    gc.collect()
    assert [each() for each in gone] == [None, None]
    assert_same(weights_of(model), before[0])
    assert_same(weights_of(clip.patcher), before[1])
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(sample(model), picture)


def test_a_copy_keeps_weight_patches() -> None:
    model = small_model().clone()
    name = next(name for name in model.model.state_dict() if name.endswith("attn2.to_k.weight"))
    weight = model.model.state_dict()[name].clone()
    model.add_patches({name: ("diff", (torch.ones_like(weight),))})
    with with_gradients():
        copied = private_copy(model)
        with loaded(copied):
            torch.testing.assert_close(copied.model.state_dict()[name], weight + 1)
    assert torch.equal(model.model.state_dict()[name], weight)


# The steps


def noisy_loss(encoder: TextEncoder, source: torch.Generator) -> Tensor:
    context, _ = encoder.encode(encoder.tokenize(PROMPT))
    return (context - torch.randn(context.shape, generator=source)).square().mean()


def interrupted(
    at: int, loss: Callable[[torch.Generator], Tensor], late: bool = False
) -> Callable[[torch.Generator], Tensor]:
    """A loss in whose middle somebody presses cancel, at the step with this number; or `late`, while its gradient is
    computed, when the step is still done."""
    done = 0

    def cancel(*_: Tensor) -> None:
        comfy.model_management.interrupt_current_processing()

    def with_cancel(source: torch.Generator) -> Tensor:
        nonlocal done
        done += 1
        if done == at and not late:
            torch.randn(5, generator=source)
            cancel()
        value = loss(source)
        if done == at and late:
            value.register_hook(cancel)
        return value

    return with_cancel


def trained(
    steps: int,
    name: str | None = None,
    cancel_at: int | None = None,
    dtype: torch.dtype = torch.float32,
    late: bool = False,
) -> tuple[dict[str, Tensor], list[float]]:
    with with_gradients():
        encoder = TextEncoder(small_clip("SD 1.x"))
        with loaded(encoder.patcher):
            weights = encoder.train_weights()
            device = encoder.patcher.load_device
            state = StateFile(name, {"noun": "dog"}) if name else None
            training = Training([Group(weights, 0.01)], device=device, dtype=dtype, seed=4, state=state)

            def loss(source: torch.Generator) -> Tensor:
                return noisy_loss(encoder, source)

            losses = training.run(steps, interrupted(cancel_at, loss, late) if cancel_at else loss)["loss"]
            return {each: weights[each].detach().clone() for each in weights}, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("late", [False, True], ids=["in the loss", "in the gradient"])
def test_a_resumed_training_is_one_that_never_stopped(output: Path, dtype: torch.dtype, late: bool) -> None:
    whole, losses = trained(8, dtype=dtype)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        trained(8, "dog", cancel_at=4, dtype=dtype, late=late)
    assert [each.name for each in (output / "training").iterdir()] == ["dog.safetensors"]
    trained(6, "dog", dtype=dtype)
    again, resumed = trained(8, "dog", dtype=dtype)
    assert_same(again, whole)
    assert resumed == losses
    # And one that is done is not trained any further.
    assert_same(trained(8, "dog", dtype=dtype)[0], whole)


def test_a_training_does_not_go_back(output: Path) -> None:
    trained(4, "dog")
    with pytest.raises(
        ValueError, match=r"The training 'dog' has done 4 steps already, more than the 2 asked for; raise the steps"
    ):
        trained(2, "dog")


def test_a_vae_that_gives_no_numbers_is_not_trained_with() -> None:
    vae = noting_vae()
    vae.first_stage_model.encoder.conv_in.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="The VAE gave values that are no numbers for training picture 1; use another"):
        latents_of(vae, [torch.ones(1, 32, 32, 3)])


def test_master_weights_are_float32_and_learn() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weights, losses = trained(30, dtype=dtype)
        assert {each.dtype for each in weights.values()} == {torch.float32}
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_loss_map_is_the_hosts(output: Path) -> None:
    _, losses = trained(4)
    assert len(losses) == 4
    LossGraphNode.execute({"loss": losses}, "loss")


def test_what_a_training_cannot_go_on_from(output: Path) -> None:
    trained(1, "dog")
    with pytest.raises(ValueError, match=r"'dog' was begun with another noun \(dog, now cat\); give .* another name"):
        StateFile("dog", {"noun": "cat"}).load()
    (output / "training" / "broken.safetensors").write_bytes(b"no state")
    with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read .*; delete it to begin anew"):
        StateFile("broken", {}).load()
    for name in ("", "../dog", "a/b", " "):
        with pytest.raises(ValueError, match="is no name for a training"):
            StateFile(name, {})


def test_a_loss_that_is_no_number_ends_the_training() -> None:
    weight = torch.nn.Parameter(torch.ones(1).clone())
    training = Training([Group({"w": weight}, 0.1)], device=torch.device("cpu"), dtype=torch.float32, seed=0)
    with pytest.raises(ValueError, match=r"The loss is nan at step 1; lower the learning rate"):
        training.run(2, lambda _: (weight * float("nan")).sum())


# Pictures


def test_pictures_of_any_kind_become_squares() -> None:
    batches = [torch.rand(2, 40, 64, 3), torch.rand(1, 64, 40, 4)]
    pictures = pictures_of(batches)
    assert [tuple(each.shape) for each in pictures] == [(1, 40, 64, 3), (1, 40, 64, 3), (1, 64, 40, 3)]
    striped = torch.zeros(1, 32, 96, 3)
    striped[:, :, 32:64] = 1
    assert torch.equal(square(striped, 32), torch.ones(1, 32, 32, 3))


def test_latents_may_be_trained_with() -> None:
    latents = latents_of(small_vae(), [torch.rand(1, 32, 32, 3)] * 2)
    assert latents.shape == (2, 4, 4, 4)
    with with_gradients():
        weight = torch.ones(1, requires_grad=True)
        (latents.clone() * weight).sum().backward()
