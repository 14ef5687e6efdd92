"""The steps of a training: the given models stay, a cancelled one goes on to what it would have been."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy_extras.nodes_train import LossGraphNode
from safetensors.torch import save_file
from subject_patches.patches.parts.writing import NAME_MAX
from subject_patches.tests.shared.clips import small_clip
from subject_patches.tests.shared.models import sample, small_model
from subject_patches.training import loop
from subject_patches.training.copies import loaded, private_copy, with_gradients
from subject_patches.training.denoising import Denoiser
from subject_patches.training.loop import Group, Training
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


def cancelled(model: Any, clip: Any) -> list[weakref.ref[Any]]:
    """Trains copies of both until somebody presses cancel; gives references to the copies."""
    encoder, denoiser = TextEncoder(clip), Denoiser(model, torch.float32, True)
    with loaded(encoder.patcher, denoiser.patcher):
        training = Training([Group(encoder.train_weights(), 0.1)], device=denoiser.device, dtype=torch.float32, seed=0)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            training.run(10, interrupted(3, lambda source: noisy_loss(encoder, source)))
    assert training.step == 2
    return [weakref.ref(each) for each in (encoder.patcher.model, denoiser.patcher.model)]


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
    # What only the one or the other says of itself counts, too.
    for about, said in (({}, r"noun \(dog, now None\)"), ({"noun": "dog", "size": "64"}, r"size \(None, now 64\)")):
        with pytest.raises(ValueError, match=f"'dog' was begun with another {said}"):
            StateFile("dog", about).load()
    broken = output / "training" / "broken.safetensors"
    for metadata in ("no file", None, {"about": "{}"}, {"about": "{", "values": "{}"}):
        if metadata == "no file":
            broken.write_bytes(b"no state")
        else:
            save_file({"w": torch.ones(1)}, broken, metadata)
        with pytest.raises(ValueError, match=r"broken\.safetensors cannot be read .*; delete it to begin anew"):
            StateFile("broken", {}).load()
    for name in ("", "../dog", "a/b", " ", "é" * (NAME_MAX // 2 + 1)):
        with pytest.raises(ValueError, match="is no name for a training"):
            StateFile(name, {})


def of_one_weight(dtype: torch.dtype = torch.float32, state: StateFile | None = None) -> tuple[Training, Tensor]:
    weight = torch.nn.Parameter(torch.ones(1).clone())
    return Training([Group({"w": weight}, 0.1)], device=torch.device("cpu"), dtype=dtype, seed=0, state=state), weight


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_loss_that_is_no_number_ends_the_training(number: str) -> None:
    training, weight = of_one_weight()
    with pytest.raises(ValueError, match=f"The loss is {number} at step 1; lower the learning rate"):
        training.run(2, lambda _: (weight * float(number)).sum())


def test_a_crash_costs_the_steps_since_the_last_save(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    with with_gradients():
        training, weight = of_one_weight(state=StateFile("dog", {}))

        def crashes(_: torch.Generator) -> Tensor:
            if training.step == 3:
                raise RuntimeError("out of memory")
            return weight.square().sum()

        with pytest.raises(RuntimeError, match="out of memory"):
            training.run(9, crashes)
        assert of_one_weight(state=StateFile("dog", {}))[0].step == 2


def test_the_scale_of_half_precision_goes_on(output: Path) -> None:
    """A gradient that is too large halves it and leaves the step out, once."""
    with with_gradients():
        training, weight = of_one_weight(torch.float16, StateFile("dog", {}))
        before = training.scaler.get_scale()
        training.run(1, lambda _: (weight.float() * 1e34).sum())
        assert float(weight.detach()) == 1
        assert of_one_weight(torch.float16, StateFile("dog", {}))[0].scaler.get_scale() == before / 2
