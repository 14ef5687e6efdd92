"""What is kept between runs of a server's queue: none of it may show in another run, whatever the host has cached."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from host import Host, Server
from hosting.client import Progress
from hosting.errors import WorkflowError
from safetensors.torch import save_file
from soaking.served import shown

Workflow = dict[str, dict[str, Any]]
CHECKPOINT = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "subject-patches-toy.safetensors"}}
SAMPLING = {"steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}


# Another pack's node that makes a conditioning of its own.
FORGETFUL = """
class Forgetful:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "rewritten", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def rewritten(self, conditioning):
        return ([[tokens, {}] for tokens, _ in conditioning],)


NODE_CLASS_MAPPINGS = {"ForgetfulRewriter": Forgetful}
"""


@pytest.fixture(scope="module")
def lru(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps what a workflow no longer has, with another pack."""
    base = tmp_path_factory.mktemp("lru")
    pack = base / "custom_nodes" / "forgetful.py"
    pack.parent.mkdir()
    pack.write_text(FORGETFUL, encoding="utf-8")
    with Server(host, base=base, arguments=["--cache-lru", "100"]) as running:
        yield running


# A record and its run


def inspected(seeds: dict[str, int], opacity: float) -> Workflow:
    """One Record Attention, a sampler and an inspector for each seed."""
    settings = {
        "show": "cross-attention", "arrange": "subjects by steps", "layers": "", "first_step": 1, "last_step": 100,
        "subjects": "", "tokens": False, "opacity": opacity,
    }  # fmt: skip
    workflow: Workflow = {
        "1": CHECKPOINT,
        "2": {
            "class_type": "SubjectPatchesEncodePrompt",
            "inputs": {"clip": ["1", 1], "text": "an emblem on grass", "phrases": "emblem"},
        },
        "3": {
            "class_type": "SubjectPatchesRecordAttention",
            "inputs": {"model": ["1", 0], "phrases": "", "picture": 1},
        },
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    }
    for name, seed in seeds.items():
        given = {"model": ["3", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["4", 0]}
        workflow[f"{name}1"] = {"class_type": "KSampler", "inputs": {**given, **SAMPLING, "seed": seed}}
        workflow[f"{name}2"] = {"class_type": "VAEDecode", "inputs": {"samples": [f"{name}1", 0], "vae": ["1", 2]}}
        workflow[f"{name}3"] = {
            "class_type": "SubjectPatchesAttentionInspector",
            "inputs": {"record": ["3", 1], "image": [f"{name}2", 0], **settings},
        }
        workflow[f"{name}4"] = {
            "class_type": "SaveImage",
            "inputs": {"images": [f"{name}3", 1], "filename_prefix": f"maps_{name}"},
        }
    return workflow


def maps_of(server: Server, seeds: dict[str, int], opacity: float) -> dict[str, Any]:
    outputs = server.queue(inspected(seeds, opacity))
    return {name: shown(server, outputs[f"{name}4"]["images"][0]) for name in seeds}


def test_each_inspector_shows_the_run_of_its_own_picture(server: Server) -> None:
    """Also when only the opacity changes, and the samplers are cached."""
    seeds = {"a": 1, "b": 2}
    alone = {name: maps_of(server, {name: seed}, 1.0)[name] for name, seed in seeds.items()}
    assert np.abs(alone["a"] - alone["b"]).mean() > 2
    for opacity in (1.0, 0.99, 1.0):
        both = maps_of(server, seeds, opacity)
        for name in seeds:
            assert np.abs(both[name] - alone[name]).mean() < 2 - opacity


def test_a_run_from_the_hosts_cache_has_its_own_record(lru: Server) -> None:
    """A sampler that is run with one seed, then another, and then with the first again, which the host has kept."""
    first, second = (maps_of(lru, {"a": seed}, 1.0)["a"] for seed in (1, 2))
    again = maps_of(lru, {"a": 1}, 0.99)["a"]
    assert np.abs(again - first).mean() < 1.01
    assert np.abs(again - second).mean() > 2
    # Until it is forgotten.
    for seed in range(3, 11):
        maps_of(lru, {"a": seed}, 1.0)
    with pytest.raises(WorkflowError, match="The run that made this picture is not among the last 8 that were rec"):
        maps_of(lru, {"a": 1}, 0.98)


# A concept and its files


def training(steps: int, name: str, number: str = "", images: Any = None, **values: Any) -> Workflow:
    """A training, and a picture of its concept."""
    settings = {
        "noun": "emblem", "name": name, "preset": "plain", "steps": steps, "size": 64, "batch_size": 1,
        "learning_rate": 0.01, "word_learning_rate": 0.3, "smallest_crop": 1.0, "image_noise": 0.0, "seed": 0,
        "precision": "auto", "gradient_checkpointing": False, "resume_name": "", "rank": 0,
    }  # fmt: skip
    links = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": images or ["5", 0]}
    given = {"positive": [f"{number}11", 0], "negative": [f"{number}11", 0], "latent_image": ["4", 0], **SAMPLING}
    return {
        "1": CHECKPOINT,
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "5": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 12345}},
        f"{number}10": {"class_type": "SubjectPatchesTrainConcept", "inputs": {**links, **settings, **values}},
        f"{number}11": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": [f"{number}10", 1], "text": f"embedding:{name} emblem on grass"},
        },
        f"{number}12": {"class_type": "KSampler", "inputs": {"model": ["1", 0], **given, "seed": 1}},
        f"{number}13": {"class_type": "VAEDecode", "inputs": {"samples": [f"{number}12", 0], "vae": ["1", 2]}},
        f"{number}14": {
            "class_type": "SaveImage",
            "inputs": {"images": [f"{number}13", 0], "filename_prefix": "concept"},
        },
    }


class Trained:
    """Queues trainings on a server; `steps` is how many the last one took, `picture` what the concept looks like."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name

    def __call__(self, steps: int, prefix: str = "x", **values: Any) -> int:
        workflow = training(steps, self.name, **values)
        # The host does not save a picture again that it has cached.
        workflow["14"]["inputs"]["filename_prefix"] = prefix
        seen: list[Progress] = []
        outputs = self.server.queue(workflow, progress=seen.append)
        self.picture = shown(self.server, outputs["14"]["images"][0])
        return max((step.done for step in seen if step.node_id == "10"), default=0)

    @property
    def files(self) -> list[Any]:
        base = self.server.base
        return [base / "models" / "embeddings" / self.file, base / "output" / "loras" / self.file]

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"


def test_a_concepts_files_are_part_of_what_it_is_known_by(server: Server) -> None:
    trained = Trained(server, "kept")
    assert trained(2) == 2
    right = trained.picture
    plain = server.queue({**training(2, "kept"), "11": _plain()})
    assert np.abs(shown(server, plain["14"]["images"][0]) - right).max() > 0
    # Neither again, nor without its files.
    stamps = [path.stat().st_mtime_ns for path in trained.files]
    assert trained(2, "again") == 0
    assert [path.stat().st_mtime_ns for path in trained.files] == stamps
    for number, path in enumerate(trained.files):
        path.rename(path.with_suffix(".away"))
        assert trained(2, f"without {number}") == 2
        assert np.array_equal(trained.picture, right)
        assert path.exists()


def _plain() -> dict[str, Any]:
    return {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "emblem on grass"}}


def test_trainings_under_one_name_in_turn(lru: Server) -> None:
    """Each prompt has its own training's words, though the host still knows the others."""
    trained = Trained(lru, "turns")
    pictures: dict[int, Any] = {}
    for turn, steps in enumerate((1, 3, 1, 3, 3)):
        trained(steps, f"turn {turn}")
        assert np.array_equal(pictures.setdefault(steps, trained.picture), trained.picture)
    assert not np.array_equal(pictures[1], pictures[3])


def test_two_trainings_of_one_name_are_refused(server: Server) -> None:
    one = training(1, "twice")
    for name in ("twice", "Twice"):
        other = training(2, name, "2")
        with pytest.raises(
            WorkflowError, match=r"The nodes 2?10 and 2?10 both train a concept of the name '[tT]wice',"
        ):
            server.queue({**one, **other})
    text = {"class_type": "PrimitiveString", "inputs": {"value": "twice"}}
    linked = training(2, "twice", "2")
    linked["210"]["inputs"]["name"] = ["30", 0]
    with pytest.raises(WorkflowError, match="both train a concept of the name 'twice'"):
        server.queue({**one, **linked, "30": text})
    # The same training twice is one.
    server.queue({**one, **training(1, "twice", "2")})


def test_a_list_of_pictures_is_one_training(server: Server) -> None:
    """As a batch of them is."""
    batched, listed = Trained(server, "batched"), Trained(server, "listed")
    assert batched(2) == 2
    workflow = training(2, "listed", images=["6", 0])
    workflow["6"] = {"class_type": "RebatchImages", "inputs": {"images": ["5", 0], "batch_size": 1}}
    seen: list[Progress] = []
    outputs = server.queue(workflow, progress=seen.append)
    assert sum(step.node_id == "10" and step.done == step.total > 0 for step in seen) == 1
    assert np.array_equal(shown(server, outputs["14"]["images"][0]), batched.picture)
    assert listed.files[0].exists()


# What another pack's node made of a prompt


def test_the_node_that_dropped_a_prompts_phrases_is_named(lru: Server) -> None:
    size = {"width": 64, "height": 64}
    given = {"positive": ["6", 0], "negative": ["3", 0], "latent_image": ["4", 0], **SAMPLING, "seed": 1}
    workflow: Workflow = {
        "1": CHECKPOINT,
        "2": {
            "class_type": "SubjectPatchesEncodePrompt",
            "inputs": {"clip": ["1", 1], "text": "an emblem on grass", "phrases": "emblem"},
        },
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {**size, "batch_size": 1}},
        "5": {"class_type": "ForgetfulRewriter", "inputs": {"conditioning": ["2", 0]}},
        # The host's own keeps what it is given.
        "6": {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": ["5", 0], "start": 0, "end": 1}},
        "7": {"class_type": "SolidMask", "inputs": {**size, "value": 1.0}},
        "8": {"class_type": "SubjectPatchesLayout", "inputs": {**size, "phrases": "emblem", "mask": ["7", 0]}},
        "9": {
            "class_type": "SubjectPatchesLayoutBias",
            "inputs": {
                "model": ["1", 0], "layout": ["8", 0], "guidance_weight": 0.08, "positive_weight": 2.5,
                "negative_weight": -5.0, "hard_mask": False, "weaken": "everywhere outside",
                "sites": "encoder and decoder",
                "start_percent": 0.0, "end_percent": 1.0,
            },
        },
        "10": {"class_type": "KSampler", "inputs": {"model": ["9", 0], **given}},
        "11": {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["1", 2]}},
        "12": {"class_type": "SaveImage", "inputs": {"images": ["11", 0], "filename_prefix": "dropped"}},
    }  # fmt: skip
    named = r"was encoded by SubjectPatchesEncodePrompt \(node 2\), but ForgetfulRewriter \(node 5\) behind it makes a"
    with pytest.raises(WorkflowError, match=rf"says? which of its words are 'emblem'.* It {named}"):
        lru.queue(workflow)
    workflow["6"]["inputs"]["conditioning"] = ["2", 0]
    assert lru.queue(workflow)["12"]["images"]


# A file that a prompt names


def test_an_embedding_that_changes_is_read_again(server: Server) -> None:
    """Without a training in the workflow, and also where the text comes by a link."""
    file = server.base / "models" / "embeddings" / "changing.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    workflow = training(1, "changing")
    del workflow["10"], workflow["5"]
    text = "embedding:changing emblem on grass"
    workflow["11"] = {
        "class_type": "SubjectPatchesEncodePrompt",
        "inputs": {"clip": ["1", 1], "text": text, "phrases": "emblem"},
    }
    pictures = []
    for number, linked in enumerate((False, False, True, True)):
        save_file({"clip_l": torch.randn(2, 64, generator=torch.Generator().manual_seed(number))}, file)
        if linked:
            workflow["20"] = {"class_type": "PrimitiveString", "inputs": {"value": text}}
            workflow["11"]["inputs"]["text"] = ["20", 0]
        images = server.queue(workflow)["14"].get("images")
        # The host tells of no new picture where it took all from its cache.
        assert images
        pictures.append(shown(server, images[0]))
    assert all(not np.array_equal(one, other) for one, other in itertools.pairwise(pictures))
