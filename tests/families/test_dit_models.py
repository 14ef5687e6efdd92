"""That the tests' small transformers are what the host would make of a file of their family."""

from __future__ import annotations

from typing import Any

import comfy.model_detection
import comfy.supported_models
import pytest
import torch
from subject_patches.patches.families import context_width
from subject_patches.tests.shared.dit_models import DITS, dit_model
from subject_patches.tests.shared.models import CONTEXT, difference, known_prompt, sample, second_context

CLASSES = {
    "FLUX.1": comfy.supported_models.Flux,
    "FLUX.1 schnell": comfy.supported_models.FluxSchnell,
    "Chroma": comfy.supported_models.Chroma,
    "FLUX.2": comfy.supported_models.Flux2,
    "Qwen-Image": comfy.supported_models.QwenImage,
    "Qwen-Image-Edit": comfy.supported_models.QwenImage,
    "Lumina 2": comfy.supported_models.Lumina2,
    "Z-Image": comfy.supported_models.ZImage,
    "SD 3.5": comfy.supported_models.SD3,
    "HiDream": comfy.supported_models.HiDream,
    "Krea 2": comfy.supported_models.Krea2,
    "Cosmos-Predict2": comfy.supported_models.CosmosT2IPredict2,
    "Anima": comfy.supported_models.Anima,
    "Wan": comfy.supported_models.WAN21_T2V,
}
over_dits = pytest.mark.parametrize("name", DITS)


@over_dits
def test_the_host_detects_it(name: str) -> None:
    config = DITS[name].detected
    description = comfy.model_detection.model_config_from_unet_config(config, {})
    assert type(description) is CLASSES[name]
    description.set_inference_dtype(torch.float32, None, device=torch.device("cpu"))
    with torch.device("meta"):
        # For what the host makes on the CPU unless told, too.
        weights = description.get_model({}, "", device=torch.device("meta")).diffusion_model.state_dict()
    found: dict[str, Any] = comfy.model_detection.detect_unet_config(weights, "")
    assert found == config
    assert type(comfy.model_detection.model_config_from_unet(weights, "")) is CLASSES[name]


@over_dits
def test_a_prompt_acts_on_it(name: str) -> None:
    model = dit_model(name)
    assert type(model.model.model_config) is CLASSES[name]
    assert context_width(model) == CONTEXT
    once = sample(model)
    assert once.isfinite().all()
    assert torch.equal(sample(dit_model(name)), once)
    assert difference(sample(model, positive=known_prompt(3, **second_context(model, 3))), once) > 0.01
