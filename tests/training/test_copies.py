"""What tells a training's models apart."""

from __future__ import annotations

import comfy.model_management
import torch
from subject_patches.tests.shared.models import small_model
from subject_patches.training.copies import fingerprint


def test_a_models_fingerprint_is_its_own() -> None:
    """Also while another MODEL that shares its weights is loaded, with a LoRA in their place."""
    model = small_model()
    before = fingerprint(model)
    name = next(each for each in model.model.state_dict() if each.endswith("attn2.to_k.weight"))
    weight = model.model.state_dict()[name].clone()
    patched = model.clone()
    patched.add_patches({name: (torch.ones_like(weight),)})
    assert fingerprint(patched) != before
    comfy.model_management.load_models_gpu([patched])
    assert not torch.equal(model.model.state_dict()[name], weight)
    assert fingerprint(model) == before
