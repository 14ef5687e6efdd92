"""The workflows for FLUX.1, over the queue of a stock server. Its own loaders load a small FLUX and a small VAE under
the names of the released files; small text encoders, CLIP-L and T5, stand for the loader that knows but their sizes."""

from __future__ import annotations

import numpy as np
import pytest
from host import Server
from hosting.errors import WorkflowError
from hosting.workflows import find_workflow, load_workflow

from ..shared.queued import PIXELS, picture, replaced, shrunk

NAMES = ("reference_flux", "two_subjects_flux", "layout_flux")
TOY = "subject-patches-toy.safetensors"
ENCODERS = {"DualCLIPLoader": ("SmallClip", {"family": "FLUX.1"})}


def test_workflows_run_through_the_hosts_loaders(flux_server: Server) -> None:
    prompts = flux_server.to_api_each([load_workflow(find_workflow(name)) for name in NAMES])
    for name, api in zip(NAMES, prompts, strict=True):
        patched = picture(flux_server, shrunk(replaced(api, ENCODERS)))
        assert patched.shape == (PIXELS, PIXELS, 3), name
        (sampler,) = (node for node in api.values() if node["class_type"] == "KSampler")
        (loader,) = (number for number, node in api.items() if node["class_type"] == "UNETLoader")
        sampler["inputs"]["model"] = [loader, 0]
        # A layout moves few of the 256 tokens that T5 fills its prompts up to.
        assert np.abs(picture(flux_server, api) - patched).max() > (0 if name == "layout_flux" else 3), name


def test_a_picture_is_retouched(flux_server: Server) -> None:
    """It begins where the inverted picture ended; without the swap it becomes another."""
    api = shrunk(replaced(flux_server.to_api(load_workflow(find_workflow("retouch_flux"))), ENCODERS))
    patched = picture(flux_server, api)
    assert patched.shape == (PIXELS, PIXELS, 3)
    (guider,) = (node["inputs"] for node in api.values() if node["class_type"] == "CFGGuider")
    assert guider["cfg"] == 1
    (swap,) = (node["inputs"] for node in api.values() if node["class_type"] == "SubjectPatchesMultiSourceSwap")
    guider["model"] = swap["model"]
    assert np.abs(picture(flux_server, api) - patched).max() > 3


def test_phrases_are_found_in_the_tokens_of_t5(flux_server: Server) -> None:
    """A phrase that T5 has no letters for is refused by name; CLIP knows it."""
    api = shrunk(replaced(flux_server.to_api(load_workflow(find_workflow("layout_flux"))), ENCODERS))
    (prompt,) = (node["inputs"] for node in api.values() if node["class_type"] == "SubjectPatchesEncodePrompt")
    prompt |= {"text": "a 🐶 and a 🐱 in a room", "phrases": "🐶"}
    with pytest.raises(WorkflowError, match="The text encoder t5xxl cannot tell the phrase '🐶'"):
        flux_server.queue(api)


def test_bad_input_is_one_sentence(flux_server: Server) -> None:
    """Layers of another family, and a subject that another family's VAE encoded."""
    api = shrunk(replaced(flux_server.to_api(load_workflow(find_workflow("reference_flux"))), ENCODERS))
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
