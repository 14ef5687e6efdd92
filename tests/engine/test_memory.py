"""What a run keeps on the model's device is told to the host before it loads the model."""

from __future__ import annotations

from typing import Any

import comfy.sampler_helpers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from subject_patches.patches.engine.engine import SESSION
from subject_patches.tests.shared.dit_models import PATCHED, dit_model
from subject_patches.tests.shared.mechanisms import FLUX_MECHANISMS, MECHANISMS
from subject_patches.tests.shared.models import recycled, routed, sample, small_model, subject_for
from subject_patches.tests.shared.subject_encoders import encoded_subject

BY_NAME = {each.name: each for each in (*MECHANISMS, *FLUX_MECHANISMS)}


def told_and_kept(model: Any, **run: Any) -> tuple[int, int]:
    """How much memory, in bytes, the host was told of for a run besides the picture's, and how much of features its
    session held at most when the model had run."""
    told: list[int] = []
    kept: list[int] = []

    def prepare(executor: Any, patcher: Any, shape: Any, conds: Any, **given: Any) -> Any:
        told.append(comfy.sampler_helpers.get_additional_models(conds, patcher.model_dtype())[1])
        return executor(patcher, shape, conds, **given)

    def predict(executor: Any, x: Any, timestep: Any, options: dict[str, Any], seed: Any = None) -> Any:
        result = executor(x, timestep, options, seed)
        session = options["transformer_options"].get(SESSION)
        recordings = [] if session is None else session.recordings.values()
        features = [f for each in recordings for parts in each.features.values() for f in parts.values()]
        kept.append(sum(tensor.numel() * tensor.element_size() for tensor in features))
        return result

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "watched", prepare)
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watched", predict)
    sample(watched, **run)
    assert len(told) == 1
    return told[0], max(kept)


@pytest.mark.parametrize("name", PATCHED)
def test_of_references_of_a_transformer(name: str) -> None:
    model = dit_model(name)
    patched = recycled(routed(model, (subject_for(model, 1),)), (subject_for(model, 2),))
    told, kept = told_and_kept(patched, size=(7, 9))
    assert told == kept > 0


def test_of_references_of_anystory() -> None:
    told, kept = told_and_kept(BY_NAME["AnyStory with three subjects"].on(dit_model("FLUX.1")))
    assert told == kept > 0


@pytest.mark.parametrize(
    ("level", "types"),
    [
        ("current", (torch.float32, None)),
        ("nearly clean", (torch.bfloat16, None)),
        ("nearly clean", (torch.float8_e4m3fn, torch.float32)),
    ],
)
def test_of_references_of_a_unet(level: str, types: tuple[torch.dtype, torch.dtype | None]) -> None:
    model = small_model(dtype=types[0], compute=types[1])
    patched = recycled(model, (subject_for(model, 1), subject_for(model, 2)), noise_level=level)
    told, kept = told_and_kept(patched, size=(7, 9), batch=2)
    assert told == kept > 0


def test_the_most_that_a_step_keeps_is_told() -> None:
    """Where each step keeps other layers."""
    model = small_model()
    patched = recycled(model, (subject_for(model),), keep_probability=0.5, noise_level="current")
    told, kept = told_and_kept(patched, steps=4)
    assert told == kept > 0


def test_of_paths_and_branches() -> None:
    model = small_model()
    for name in ("a swapped reference", "dual branch"):
        told, kept = told_and_kept(BY_NAME[name].on(model))
        assert told == kept > 0


def test_what_a_trained_encoder_made_is_brought_there_once() -> None:
    model = small_model()
    one = encoded_subject(model, subject_for(model))
    brought = recycled(model, (one,))
    told, kept = told_and_kept(brought)
    assert kept == 0
    sizes = [tensor.numel() for pair in one.encoded.references[0].ready.values() for tensor in pair]
    assert told == 4 * sum(sizes) > 0
    assert told_and_kept(recycled(brought, (one,)))[0] == told


def test_a_run_that_keeps_nothing_takes_no_more() -> None:
    assert told_and_kept(BY_NAME["layout bias"].on(small_model())) == (0, 0)
    assert told_and_kept(small_model()) == (0, 0)
