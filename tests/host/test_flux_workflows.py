"""The workflows for FLUX.1, over the queue of a stock server. Its own loaders load a small FLUX and a small VAE under
the names of the released files; small text encoders, CLIP-L and T5, stand for the loader that knows but their sizes.

DualCLIPLoader takes no small files: for the type flux `load_text_encoder_state_dicts` (comfy/sd.py) makes a
`flux_clip` whatever they hold, whose `T5XXLModel` (comfy/text_encoders/sd3_clip.py) reads its sizes from
t5_config_xxl.json, 24 layers of 4096, and whose CLIP-L reads sd1_clip_config.json. Weights of other shapes are an
error; those of these are 4.8 billion numbers, 9.5 GB in half precision. `SDClipModel` (comfy/sd1_clip.py) would let
a `t5xxl_model_config` among the model's options go over the sizes, as the tests' encoders do, but the loader gives
no option but the device."""

from __future__ import annotations

import numpy as np
import pytest
from host import Server
from hosting.client import ApiPrompt
from hosting.errors import WorkflowError
from soaking.workflows import PIXELS, small_workflows

from ..shared.queued import picture, pictures

NAMES = ("reference_flux", "two_subjects_flux", "layout_flux")
TOY = "subject-patches-toy.safetensors"


def _small(server: Server, name: str) -> ApiPrompt:
    return small_workflows(server, [name])[name]


def test_workflows_run_through_the_hosts_loaders(flux_server: Server) -> None:
    for name, api in small_workflows(flux_server, NAMES).items():
        patched = pictures(flux_server, api)
        assert {each.shape for each in patched.values()} == {(PIXELS, PIXELS, 3)}, name
        (loader,) = (number for number, node in api.items() if node["class_type"] == "UNETLoader")
        for node in api.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["model"] = [loader, 0]
        unpatched = pictures(flux_server, api)
        moved = {api[n]["_meta"]["title"]: float(np.abs(unpatched[n] - each).max()) for n, each in patched.items()}
        # A layout moves few of the 256 tokens that T5 fills its prompts up to.
        least = 0 if name == "layout_flux" else 3
        assert moved.pop("After: each in its box" if name == "layout_flux" else "The picture") > least, name
        assert set(moved.values()) <= {0.0}, name


def test_a_picture_is_retouched(flux_server: Server) -> None:
    """It begins where the inverted picture ended; without the swap it becomes another."""
    api = _small(flux_server, "retouch_flux")
    patched = picture(flux_server, api)
    assert patched.shape == (PIXELS, PIXELS, 3)
    (guider,) = (node["inputs"] for node in api.values() if node["class_type"] == "CFGGuider")
    assert guider["cfg"] == 1
    (swap,) = (node["inputs"] for node in api.values() if node["class_type"] == "SubjectPatchesMultiSourceSwap")
    guider["model"] = swap["model"]
    assert np.abs(picture(flux_server, api) - patched).max() > 3


def test_phrases_are_found_in_the_tokens_of_t5(flux_server: Server) -> None:
    """A phrase that T5 has no letters for is refused by name; CLIP knows it."""
    api = _small(flux_server, "layout_flux")
    (prompt,) = (node["inputs"] for node in api.values() if node["class_type"] == "SubjectPatchesEncodePrompt")
    prompt |= {"text": "a 🐶 and a 🐱 in a room", "phrases": "🐶"}
    with pytest.raises(WorkflowError, match="The text encoder t5xxl cannot tell the phrase '🐶'"):
        flux_server.queue(api)


def test_bad_input_is_one_sentence(flux_server: Server) -> None:
    """Layers of another family, and a subject that another family's VAE encoded."""
    api = _small(flux_server, "reference_flux")
    (patch,) = (n["inputs"] for n in api.values() if n["class_type"] == "SubjectPatchesRecycledSelfAttention")
    (subject,) = (n["inputs"] for n in api.values() if n["class_type"] == "SubjectPatchesSubject")
    usual = dict(patch)
    patch |= {"sites": "named", "named_sites": "output.3"}
    with pytest.raises(WorkflowError, match=r"'output\.3' names no .* of this model; it has double\.0"):
        flux_server.queue(api)
    patch |= usual
    api["toy"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": TOY}}
    subject["vae"] = ["toy", 2]
    with pytest.raises(WorkflowError, match="VAE of 8 latent channels but this model takes 16"):
        flux_server.queue(api)
