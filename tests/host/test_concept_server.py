"""A concept trained and used on a stock server."""

from __future__ import annotations

import re
from typing import Any

from host import Server
from soaking.served import shown

CHECKPOINT = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "subject-patches-toy.safetensors"}}


def test_a_server_trains_it_and_its_own_nodes_use_it(server: Server) -> None:
    """Trained by one queued workflow, and then loaded by another with the host's nodes alone."""
    name = "concept_of_the_tests"
    settings = {"noun": "emblem", "name": name, "preset": "plain", "steps": 2, "size": 128, "batch_size": 1}
    rates = {"learning_rate": 0.02, "word_learning_rate": 0.05, "smallest_crop": 0.75, "image_noise": 0.02}
    rest = {"seed": 0, "precision": "auto", "gradient_checkpointing": False, "resume_name": ""}
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0]}
    train = {"class_type": "SubjectPatchesTrainConcept", "inputs": {**links, **settings, **rates, **rest}}
    picture = {"class_type": "EmptyImage", "inputs": {"width": 128, "height": 128, "batch_size": 2, "color": 12345}}
    server.queue({"1": CHECKPOINT, "2": picture, "3": train})

    def used(strength: float, words: str) -> bytes:
        def encoded(text: str) -> dict[str, Any]:
            return {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": text}}

        lora = {"lora_name": f"{name}.safetensors", "strength_model": strength, "model": ["1", 0]}
        chosen = {"seed": 1, "steps": 2, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        given = {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]}
        size = {"width": 128, "height": 128, "batch_size": 1}
        outputs = server.queue(
            {
                "1": CHECKPOINT,
                "2": {"class_type": "LoraLoaderModelOnly", "inputs": lora},
                "3": encoded(f"{words} on grass"),
                "4": encoded(""),
                "5": {"class_type": "EmptyLatentImage", "inputs": size},
                "6": {"class_type": "KSampler", "inputs": {**given, **chosen}},
                "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
                "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "concept"}},
            }
        )
        return shown(server, outputs["8"]["images"][0]).tobytes()

    pictures = [used(1.0, f"embedding:{name} emblem"), used(1.0, "emblem"), used(0.0, f"embedding:{name} emblem")]
    # Both of its parts count.
    assert len(set(pictures)) == 3
    log = server.log.read_text(encoding="utf-8")
    assert f"embedding:{name} does not exist" not in log
    assert not re.findall("lora key not loaded: (.*)", log)
