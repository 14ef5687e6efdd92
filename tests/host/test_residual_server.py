"""Residual tokens on a stock server: trained, saved, loaded and applied over its queue, and cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import threading
from typing import Any

import aiohttp
import pytest
from hosting.client import Progress
from hosting.errors import WorkflowInterrupted
from hosting.server import Server

CHECKPOINT = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "subject-patches-toy.safetensors"}}


def training(steps: int, **values: Any) -> dict[str, dict[str, Any]]:
    inputs = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "noun": "emblem", "steps": steps,
        "learning_rate": 0.001, "batch_size": 1, "preservation": 0.1, "size": 128, "captions": "a {}",
        "more_templates": "", "tunes": "text encoder", "loss": "what the model predicts",
        "seed": 0, "precision": "auto", "gradient_checkpointing": False, "resume_name": "",
    }  # fmt: skip
    return {
        "1": CHECKPOINT,
        "2": {"class_type": "LoadImage", "inputs": {"image": "subject_patches_emblem.png"}},
        "3": {"class_type": "SubjectPatchesTrainResidualToken", "inputs": {**inputs, **values}},
        "4": {
            "class_type": "SubjectPatchesSaveResidualToken",
            "inputs": {"residual": ["3", 0], "filename_prefix": "emblem"},
        },
        "5": {"class_type": "LossGraphNode", "inputs": {"loss": ["3", 1], "filename_prefix": "loss"}},
    }


def picture(file: str, strength: float) -> dict[str, dict[str, Any]]:
    given = {"seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "1": CHECKPOINT,
        "2": {"class_type": "SubjectPatchesLoadResidualToken", "inputs": {"file": file, "clip": ["1", 1]}},
        "3": {
            "class_type": "SubjectPatchesEncodePrompt",
            "inputs": {"clip": ["1", 1], "text": "an emblem on grass", "phrases": "emblem"},
        },
        "4": {
            "class_type": "SubjectPatchesApplyResidualTokens",
            "inputs": {"conditioning": ["3", 0], "residual": ["2", 0], "strength": strength, "phrase": ""},
        },
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 128, "batch_size": 1}},
        "6": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["4", 0],
                "negative": ["3", 0],
                "latent_image": ["5", 0],
                **given,
            },
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "residual"}},
    }


def test_train_save_load_apply(server: Server) -> None:
    seen: list[Progress] = []
    outputs = server.queue(training(3, resume_name="emblem"), progress=seen.append)
    (file,) = outputs["4"]["text"]
    assert (server.base / "models" / "residual_tokens" / file).is_file()
    assert outputs["5"]["images"]
    assert (server.base / "output" / "training" / "emblem.safetensors").is_file()
    assert [(step.done, step.total) for step in seen if step.node_id == "3"][-1] == (3, 3)
    pictures = []
    for strength in (0.0, 1.0):
        (image,) = server.queue(picture(file, strength))["8"]["images"]
        pictures.append(server.fetch(image))
    assert pictures[0] != pictures[1]


def test_a_copy_of_the_node_does_not_train_again(server: Server) -> None:
    """A training that the host still knows is taken from its cache, under whatever number the node goes."""
    known = training(2, seed=11)
    copy = {number: each for number, each in known.items() if number != "3"} | {"30": known["3"]}
    copy["4"] = {**known["4"], "inputs": {**known["4"]["inputs"], "residual": ["30", 0]}}
    copy["5"] = {**known["5"], "inputs": {**known["5"]["inputs"], "loss": ["30", 1], "filename_prefix": "copy"}}
    trained: dict[str, list[Progress]] = {"3": [], "30": []}
    for number, prompt in (("3", known), ("30", copy)):
        outputs = server.queue(prompt, progress=trained[number].append)
        assert outputs["5"]["images"]
    steps = {number: [step for step in seen if step.node_id == number] for number, seen in trained.items()}
    assert steps["3"]
    assert not steps["30"]


async def _texts_while(server: Server, prompt: dict[str, dict[str, Any]]) -> list[str]:
    """The lines that a run shows on its nodes: binary messages of the host's kind 3."""
    texts: list[str] = []
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{server.url}/ws?clientId=watcher", max_msg_size=2**26) as socket,
    ):
        run = asyncio.create_task(asyncio.to_thread(server.queue, prompt))
        while not run.done():
            with contextlib.suppress(asyncio.TimeoutError):
                message = await asyncio.wait_for(socket.receive(), 0.5)
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == struct.pack(">I", 3):
                    texts.append(message.data[9:].decode("utf-8"))
        await run
    return texts


def test_a_training_tells_its_loss_and_the_time_left(server: Server) -> None:
    warning, *texts = asyncio.run(_texts_while(server, training(12)))
    assert "has one picture" in warning
    assert texts
    assert all(re.fullmatch(r"step \d+ of 12, loss \d+\.\d{4}(, \d\d:\d\d left)?", text) for text in texts), texts
    assert any("left" in text for text in texts)
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert re.search(r"Training: .*12/12 .*loss=", log)


def test_cancel_ends_a_training_at_once(server: Server) -> None:
    def stop(step: Progress) -> None:
        if step.node_id == "3" and step.done >= 1:
            threading.Thread(target=server.interrupt).start()

    with pytest.raises(WorkflowInterrupted):
        server.queue(training(500_000), progress=stop, seconds=120)
    assert server.queue(training(2))["4"]["text"]
