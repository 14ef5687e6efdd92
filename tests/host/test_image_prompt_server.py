"""An adapter's image prompt on a stock server: loaded, encoded and shown over its queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import torch
from host import ROOT
from hosting.server import Server
from safetensors.torch import save_file
from soaking.served import shown
from subject_patches.nodes.image_prompt import layer_channels
from subject_patches.patches.mechanisms.image_prompt import in_file_order
from subject_patches.toy.family import register

from ..shared.models import generator

TOY = ROOT / "toy" / "weights" / "subject-patches-toy.safetensors"
TOKENS = 4


def vision_file(path: Path) -> None:
    """CLIP ViT-L with random weights, by the host's own names."""
    config = Path(comfy.clip_vision.__file__).with_name("clip_vision_config_vitl.json")
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in comfy.clip_vision.ClipVisionModel(str(config)).get_sd().items()}
    source = generator(1)
    # One run of random numbers serves all: what matters is that pictures give different outputs.
    numbers = torch.randn(max(shape.numel() for shape in shapes.values()), generator=source).half() * 0.03
    tensors = {k: numbers[: shape.numel()].reshape(shape).clone() for k, shape in shapes.items()}
    norms = {k: torch.ones_like(v) for k, v in tensors.items() if "norm" in k and k.endswith("weight")}
    save_file(tensors | norms, path)


def adapter_file(path: Path) -> None:
    """The plain form for the toy and ViT-L's pooled output."""
    register()
    model = comfy.sd.load_checkpoint_guess_config(str(TOY), output_vae=False, output_clip=False)[0]
    channels, width, source = layer_channels(model, "cross"), 64, generator(2)
    tensors = {
        "image_proj.proj.weight": torch.randn(TOKENS * width, 768, generator=source) * 0.1,
        "image_proj.proj.bias": torch.zeros(TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for number, site in enumerate(in_file_order(channels)):
        for part in "kv":
            name = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
            tensors[name] = torch.randn(channels[site], width, generator=source) * 0.2
    save_file(tensors, path)


def graph(eta: float) -> dict[str, dict[str, Any]]:
    sampling = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    wired = {"model": ["9", 0], "positive": ["7", 0], "negative": ["7", 0], "latent_image": ["8", 0]}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": TOY.name}),
        "2": ("LoadImage", {"image": "subject_patches_emblem.png"}),
        "3": ("SubjectPatchesSubject", {"image": ["2", 0], "vae": ["1", 2], "phrase": "", "size": 96, "margin": 0.1}),
        "4": ("SubjectPatchesLoadImagePromptAdapter", {"file": "toy-adapter.safetensors"}),
        "5": ("CLIPVisionLoader", {"clip_name": "vit-l.safetensors"}),
        "6": (
            "SubjectPatchesEncodeImagePrompt",
            {"subject": ["3", 0], "adapter": ["4", 0], "clip_vision": ["5", 0], "background": "removed"},
        ),
        "7": ("CLIPTextEncode", {"clip": ["1", 1], "text": "an emblem on grass"}),
        "8": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "9": (
            "SubjectPatchesRoutedReferenceAttention",
            {"model": ["1", 0], "subjects": ["6", 0], "router": ["10", 0], "strength": 0.0, "eta": eta}
            | {"start_percent": 0.0, "end_percent": 1.0},
        ),
        "10": ("SubjectPatchesRouteByMasks", {"masks": ["11", 0]}),
        "11": ("SolidMask", {"value": 1.0, "width": 64, "height": 64}),
        "12": ("KSampler", {**sampling, **wired}),
        "13": ("VAEDecode", {"samples": ["12", 0], "vae": ["1", 2]}),
        "14": ("SaveImage", {"images": ["13", 0], "filename_prefix": "image_prompt"}),
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def test_over_the_queue(server: Server) -> None:
    """The picture changes with the image prompt, comes again bit for bit, and without it is the plain one."""
    for folder, write, name in (
        ("clip_vision", vision_file, "vit-l.safetensors"),
        ("ipadapter", adapter_file, "toy-adapter.safetensors"),
    ):
        (server.base / "models" / folder).mkdir(parents=True, exist_ok=True)
        write(server.base / "models" / folder / name)

    def picture(prompt: dict[str, dict[str, Any]]) -> bytes:
        (image,) = server.queue(prompt)["14"]["images"]
        return shown(server, image).tobytes()

    patched, without = picture(graph(1.0)), graph(0.0)
    without["12"]["inputs"]["model"] = ["1", 0]
    plain = picture(without)
    assert patched != plain
    assert picture(graph(0.0)) == plain
    again = graph(1.0)
    # Something that the host's cache does not know.
    again["14"]["inputs"]["filename_prefix"] = "again"
    assert picture(again) == patched
    for name in ("clip_vision/vit-l.safetensors", "ipadapter/toy-adapter.safetensors"):
        (server.base / "models" / name).unlink()
