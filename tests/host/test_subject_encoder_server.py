"""A subject encoder on a stock server: loaded, run and shown over its queue."""

from __future__ import annotations

from typing import Any

import comfy.sd
from host import ROOT
from hosting.server import Server
from soaking.served import shown
from subject_patches.nodes.model_files import SUBJECT_ENCODERS
from subject_patches.toy.family import register

from ..shared.subject_encoders import file_for, written

TOY = ROOT / "toy" / "weights" / "subject-patches-toy.safetensors"
FILE = "toy-encoder.safetensors"


def graph() -> dict[str, dict[str, Any]]:
    sampling = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    wired = {"model": ["8", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["7", 0]}
    window = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": TOY.name}),
        "2": ("LoadImage", {"image": "subject_patches_emblem.png"}),
        "3": ("SubjectPatchesSubject", {"image": ["2", 0], "vae": ["1", 2], "phrase": "", "size": 96, "margin": 0.1}),
        "4": ("SubjectPatchesLoadSubjectEncoder", {"file": FILE}),
        "5": ("SubjectPatchesEncodeSubjects", {"vae": ["1", 2], "subject": ["3", 0], "encoder": ["4", 0]}),
        "6": ("CLIPTextEncode", {"clip": ["1", 1], "text": "an emblem on grass"}),
        "7": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "8": ("SubjectPatchesRecycledSelfAttention", {"model": ["1", 0], "subject": ["5", 0], **window}),
        "9": ("KSampler", {**sampling, **wired}),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["1", 2]}),
        "11": ("SaveImage", {"images": ["10", 0], "filename_prefix": "encoded"}),
    }
    graph = {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}
    # The picture's opacity is the mask of it that Load Image gives upside down.
    graph["12"] = {"class_type": "InvertMask", "inputs": {"mask": ["2", 1]}}
    graph["3"]["inputs"]["mask"] = ["12", 0]
    return graph


def test_over_the_queue(server: Server) -> None:
    """The picture changes with an encoded subject, comes again bit for bit, and at strength 0 is the plain one."""
    register()
    model = comfy.sd.load_checkpoint_guess_config(str(TOY), output_vae=False, output_clip=False)[0]
    folder = server.base / "models" / SUBJECT_ENCODERS.name
    folder.mkdir(parents=True, exist_ok=True)
    written(folder / FILE, *file_for(model))

    def picture(**changed: Any) -> bytes:
        prompt = graph()
        prompt["8"]["inputs"].update({"strength": changed.get("strength", 1.0)})
        prompt["9"]["inputs"].update({name: value for name, value in changed.items() if name == "model"})
        prompt["11"]["inputs"].update({name: value for name, value in changed.items() if name == "filename_prefix"})
        (image,) = server.queue(prompt)["11"]["images"]
        return shown(server, image).tobytes()

    patched, plain = picture(), picture(model=["1", 0])
    assert patched != plain
    assert picture(strength=0.0) == plain
    # Something that the host's cache does not know.
    assert picture(filename_prefix="again") == patched
    (folder / FILE).unlink()
