"""SD 1.5, SD 2.1, SDXL and its refiner with random weights: small ones under every mechanism, and of real shapes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.supported_models
import pytest
import torch
from comfy.model_base import ModelType
from hosting.random_models import SD, SDXL, SMALL, fill_shared, generator, model_of
from subject_patches.patches.families import attention_sites, family_of
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.tests.shared.mechanisms import Mechanism, left_half, over_mechanisms
from subject_patches.tests.shared.models import POOLED, difference, known_prompt, laid_out, prompt, recycled, sample

REFINER = {
    **SDXL,
    "model_channels": 384,
    "adm_in_channels": 2560,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
    "transformer_depth_middle": 4,
    "context_dim": 1280,
}


@dataclass(frozen=True)
class Family:
    """One family: the host's class, its U-Net, what it should be called, how many self-attentions it has by stage."""

    name: str
    known_as: str
    description: Any
    config: dict[str, Any]
    stages: dict[str, int]
    dtype: torch.dtype = torch.float32
    pooled: int = 0
    prediction: ModelType = ModelType.EPS
    hints: dict[str, torch.Tensor] = field(default_factory=dict)


known = comfy.supported_models
# The host tells a v-prediction SD 2.1 by one of its biases.
V_PREDICTION = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.randn(320, generator=generator(0))}
FAMILIES = (
    Family("SD 1.5", "SD 1.x", known.SD15, {**SD, "context_dim": 768}, {"encoder": 6, "middle": 1, "decoder": 9}),
    Family(
        "SD 2.1",
        "SD 2.x",
        known.SD20,
        {**SD, "context_dim": 1024, "use_linear_in_transformer": True},
        {"encoder": 6, "middle": 1, "decoder": 9},
        torch.bfloat16,
        0,
        ModelType.V_PREDICTION,
        V_PREDICTION,
    ),
    Family("SDXL", "SDXL", known.SDXL, SDXL, {"encoder": 24, "middle": 10, "decoder": 36}, torch.bfloat16, 1280),
    Family(
        "SDXL refiner",
        "SDXL refiner",
        known.SDXLRefiner,
        REFINER,
        {"encoder": 16, "middle": 4, "decoder": 24},
        torch.bfloat16,
        1280,
    ),
)


# Heads are 64 channels wide here. The host puts numbers beside SDXL's pooled output: six or five, of 256 channels each.
SMALL_2 = {**SMALL, "model_channels": 64, "use_linear_in_transformer": True}
SMALL_XL = {**SMALL_2, "num_classes": "sequential"}
SMALL_FAMILIES: dict[str, Callable[[], Any]] = {
    "SD 2.1": lambda: model_of(known.SD20, SMALL_2, hints=V_PREDICTION),
    "SDXL": lambda: model_of(known.SDXL, {**SMALL_XL, "adm_in_channels": POOLED + 6 * 256}),
    "SDXL refiner": lambda: model_of(known.SDXLRefiner, {**SMALL_XL, "adm_in_channels": POOLED + 5 * 256}),
}


@pytest.fixture(scope="module", params=SMALL_FAMILIES)
def small(request: pytest.FixtureRequest) -> Any:
    return SMALL_FAMILIES[request.param]()


@over_mechanisms
def test_every_mechanism_in_every_family(mechanism: Mechanism, small: Any) -> None:
    plain, patched = sample(small), mechanism.on(small)
    result = sample(patched, batch=2)
    assert result.isfinite().all()
    assert difference(result[:1], plain) > 0.01
    for row in (0, 1):
        assert difference(sample(patched, seed=5 + row), result[row : row + 1]) < 2e-5
    assert torch.equal(sample(mechanism.off(small, "strength 0")), plain)


@pytest.fixture(autouse=True)
def _unloaded() -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()
    gc.collect()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_two_patched_steps_of_a_real_shape(family: Family) -> None:
    model = model_of(family.description, family.config, dtype=family.dtype, hints=family.hints, fill_with=fill_shared)
    assert model.model.model_type == family.prediction
    assert family_of(model).name == family.known_as
    sites = [site for site in attention_sites(model) if site.kind == "self"]
    assert {stage: sum(site.stage == stage for site in sites) for stage in family.stages} == family.stages
    extra = {"pooled_output": torch.randn(1, family.pooled, generator=generator(9))} if family.pooled else {}
    width = family.config["context_dim"]
    prompts = {"positive": known_prompt(1, 77, width, **extra), "negative": prompt(2, 77, width, **extra)}
    run = {"size": (8, 12), "steps": 2, **prompts}
    plain = sample(model, **run)
    left = Layout(30, 20, (Region("subject", left_half()[0] > 0),))
    patched = sample(laid_out(recycled(model), left), **run)
    assert patched.isfinite().all()
    assert difference(patched, plain) > 0.01
