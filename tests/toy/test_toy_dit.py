"""The second toy: its trainer differentiates the host's own transformer, and it obeys its prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ops import disable_weight_init
from host import Server
from hosting.workflows import fetch_groups, find_workflow, load_workflow
from safetensors.torch import load_file
from subject_patches.toy import joint
from subject_patches.toy.data import Words, small_scene
from subject_patches.toy.dit_family import FLUX, IDS, TOKENS, ToyDit
from subject_patches.toy.evaluate import held_out_emblems
from subject_patches.toy.judge import load_judge
from subject_patches.toy.labels import LABELS, ROWS, UNLABELLED
from subject_patches.toy.optimisers import MuonAndAdamW
from subject_patches.toy.sampling import DIT_CHECKPOINT, Toy
from subject_patches.toy.scenes import SMALL, TEXTURES
from subject_patches.toy.train_dit import trained_parts
from subject_patches.toy.train_rectified_flow import MUON_FACTOR, Model, inside, training_loss
from subject_patches.toy.train_rectified_flow import Words as Rows


@pytest.fixture(scope="module")
def dit() -> Toy:
    """The shipped checkpoint, as the host loads it."""
    return Toy.load(DIT_CHECKPOINT)


def test_trained_transformer_is_the_hosts() -> None:
    """What the trainer differentiates is the host's own `Flux`, but for its GELU."""
    torch.manual_seed(0)
    model = Flux(**FLUX, operations=disable_weight_init)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.06)
    noisy, sigma, context, pooled = torch.randn(2, 8, 16, 16), torch.rand(2), torch.randn(2, 9, 64), torch.randn(2, 64)
    with torch.inference_mode():
        expected = model(noisy, sigma, context, pooled)
        found, _ = joint.forward(model, noisy, sigma, context, pooled, joint.positions(model, 9, 8, 8), 2)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


def test_training_learns_one_batch() -> None:
    """From the shipped weights the loss of one batch falls, and both optimisers' weights and the words have moved."""
    torch.manual_seed(0)
    ids = load_file(DIT_CHECKPOINT)["text_encoders." + IDS].long()
    model = Model(len(ids))
    model.load_state_dict(trained_parts(DIT_CHECKPOINT), strict=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tokens = Words()([small_scene(np.random.default_rng(i)).caption for i in range(8)])
    words, ends = Rows(ids, torch.device("cpu"))(tokens, torch.arange(8) == 0)
    assert int(ends[0]) == 1, "the first caption was dropped"
    latents, labels = torch.randn(8, 8, 16, 16), torch.full((8, ROWS, 16, 16), UNLABELLED)
    labels[:, len(LABELS) :] = 0
    optimiser = MuonAndAdamW(model, 1e-3, inside, MUON_FACTOR)
    losses = []
    for _ in range(4):
        torch.manual_seed(1)
        loss = training_loss(model, latents, words, ends, labels)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * group.get("times", 1.0)
    assert losses[-1] < losses[0] - 0.02
    for name in ("dit.single_blocks.3.linear1.weight", "dit.img_in.weight"):
        assert not torch.equal(before[name], model.get_parameter(name)), name
    table = "text.text_model.embeddings.token_embedding.weight"
    assert not torch.equal(before[table], model.get_parameter(table))


def test_small_world_is_small() -> None:
    """Scenes of the small world have its shapes and textures and no more than three things, unless they are a set."""
    scenes = [small_scene(np.random.default_rng((1, number))) for number in range(200)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == {*SMALL.shapes, "emblem"}
    assert {thing.texture for thing in things} == set(TEXTURES[:2])
    assert all(len(scene.things) < 4 or len({t.shape for t in scene.things}) == 1 for scene in scenes)


def test_loader_finds_the_dit(dit: Toy) -> None:
    """The host's detection takes the shipped checkpoint for the DiT, as the trainer builds it."""
    assert isinstance(dit.model.model.model_config, ToyDit)
    assert dit.model.model.latent_format.latent_channels == dit.vae.latent_channels == 8
    params = vars(dit.model.model.diffusion_model.params)
    assert {name: params[name] for name in FLUX} == FLUX
    assert DIT_CHECKPOINT.stat().st_size <= 20e6
    assert sum(tensor.numel() for tensor in load_file(DIT_CHECKPOINT).values()) <= 10e6


def test_captions_are_read_as_in_training(dit: Toy) -> None:
    """The host's text encoding of a caption is the trainer's, and so is the pooled vector; longer prompts take more
    tokens."""
    captions = [small_scene(np.random.default_rng((2, i))).caption for i in range(6)]
    ids = load_file(DIT_CHECKPOINT)["text_encoders." + IDS].long()
    model = Model(len(ids))
    model.load_state_dict(trained_parts(DIT_CHECKPOINT), strict=False)
    words, ends = Rows(ids, torch.device("cpu"))(Words()(captions), torch.zeros(6, dtype=torch.bool))
    seen: list[torch.Tensor] = []
    model.dit.txt_in.register_forward_hook(lambda layer, args, out: seen.append(args[0]))
    model.dit.vector_in.in_layer.register_forward_hook(lambda layer, args, out: seen.append(args[0]))
    with torch.inference_mode():
        model(torch.zeros(6, 8, 16, 16), torch.ones(6), words, ends)
        [[context, extra]] = dit.encode(captions)
        [[long, _]] = dit.encode(["a red star " * 20])
    torch.testing.assert_close(context.float(), seen[0], atol=2e-2, rtol=0)
    torch.testing.assert_close(extra["pooled_output"].float(), seen[1], atol=2e-2, rtol=0)
    assert long.shape[1] == 3 * TOKENS


def test_one_seed_gives_one_picture(server: Server) -> None:
    """The shipped workflow on the stock server: a seed gives its picture again, another seed gives another."""
    workflow = load_workflow(find_workflow("text_to_image_dit"))
    sampler = next(node for node in workflow["nodes"] if node["type"] == "KSampler")
    pictures = []
    # The host keeps only the last run's results, so the third run samples anew.
    for seed in (5, 6, 5):
        sampler["widgets_values"][0] = seed
        groups = fetch_groups(server, workflow, server.queue(server.to_api(workflow), workflow=workflow))
        pictures.append(groups[0].pictures)
    assert all(len(each) == len(pictures[0]) for each in pictures)
    assert _pixels(pictures[0]) == _pixels(pictures[2])
    assert _pixels(pictures[0]) != _pixels(pictures[1])


def _pixels(pictures: list[bytes]) -> list[bytes]:
    from io import BytesIO

    from PIL import Image

    return [Image.open(BytesIO(picture)).tobytes() for picture in pictures]


def test_grounds_and_emblems_are_followed(dit: Toy) -> None:
    """Of "an emblem on X" the judge finds the emblem, and the ground far more often in its own picture than in
    another's."""
    scenes = held_out_emblems(16)
    pictures = dit.sample([scene.caption for scene in scenes], list(range(16)), steps=8)
    readings = load_judge().findings(pictures)
    right, other = (
        np.mean([r.background == s.background.kind for r, s in zip(readings, some, strict=True)])
        for some in (scenes, scenes[1:] + scenes[:1])
    )
    found = np.mean([any(thing.shape == "emblem" for thing in reading.objects) for reading in readings])
    assert right > other + 0.3
    assert found > 0.5
