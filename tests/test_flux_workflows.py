"""The workflows for FLUX.1, over the queue of a stock server: its own loaders load a small model and a small VAE under
the names of the released files. Text encoders of FLUX.1's sizes are no test's; the toy's stands in for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import comfy.supported_models
import numpy as np
import pytest
import torch
from comfy.taesd.taesd import TAESD
from host import Server
from hosting.client import ApiPrompt
from hosting.random_models import FLUX, fill, model_of
from hosting.workflows import find_workflow, load_workflow
from PIL import Image
from safetensors.torch import save_file

NAMES = ("reference_flux", "two_subjects_flux", "layout_flux")
TOY = "subject-patches-toy.safetensors"
# As wide as the host's detection allows: heads of 128 channels. The toy's prompts are 64 wide.
SMALL = {**FLUX, "hidden_size": 256, "num_heads": 2, "context_in_dim": 64, "vec_in_dim": 64, "depth": 1}
PIXELS = 128


@pytest.fixture(scope="module")
def served(server: Server) -> Server:
    """The server, with the files in its folders."""
    models = server.base / "models"
    network = model_of(comfy.supported_models.Flux, SMALL).model.diffusion_model
    _save(network.state_dict(), models / "diffusion_models" / "flux1-dev.safetensors")
    vae = TAESD(latent_channels=16)
    fill(vae, 3)
    vae.vae_scale.data.fill_(1)
    _save(vae.state_dict(), models / "vae" / "ae.safetensors")
    return server


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, path)


def adapted(api: ApiPrompt) -> ApiPrompt:
    """A workflow with the toy's text encoder, for few steps of a small picture."""
    (clip,) = (number for number, node in api.items() if node["class_type"] == "DualCLIPLoader")
    api[clip] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": TOY}}
    for node in api.values():
        inputs = node["inputs"]
        inputs |= {name: [clip, 1] for name, value in inputs.items() if value == [clip, 0]}
        if node["class_type"] == "EmptySD3LatentImage":
            inputs |= {"width": PIXELS, "height": PIXELS}
        small = {"steps": 2, "size": 64}
        inputs |= {name: value for name, value in small.items() if name in inputs}
    return api


def picture(server: Server, api: ApiPrompt) -> Any:
    """The one picture that a workflow saves, (height, width, 3)."""
    ((shown,),) = (output["images"] for output in server.queue(api).values() if output.get("images"))
    with Image.open(io.BytesIO(server.fetch(shown))) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def test_workflows_run_through_the_hosts_loaders(served: Server) -> None:
    prompts = served.to_api_each([load_workflow(find_workflow(name)) for name in NAMES])
    for name, api in zip(NAMES, prompts, strict=True):
        patched = picture(served, adapted(api))
        assert patched.shape == (PIXELS, PIXELS, 3), name
        (sampler,) = (node for node in api.values() if node["class_type"] == "KSampler")
        (loader,) = (number for number, node in api.items() if node["class_type"] == "UNETLoader")
        sampler["inputs"]["model"] = [loader, 0]
        assert np.abs(picture(served, api) - patched).max() > 3, name
