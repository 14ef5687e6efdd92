"""How the toy's router is trained: pieces of it, and that what is trained is what acts."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sample
import numpy as np
import pytest
import torch
from subject_patches.encoders.by_site import module_at
from subject_patches.encoders.segmented import segmented
from subject_patches.encoders.subject_encoder import read_subject_encoder
from subject_patches.nodes.routed_reference import RoutedReferenceAttentionNode
from subject_patches.nodes.router import LEARNED, RouteByEncoderNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.nodes.subject_encoder import EncodeSubjectsNode
from subject_patches.patches.parts.masks import resize_mask
from subject_patches.toy import groups, pair_training, routing, train_router
from subject_patches.toy.data import Words
from subject_patches.toy.drawing import draw
from subject_patches.toy.pair_training import ENCODER, frozen
from subject_patches.toy.runs import Peers
from subject_patches.toy.sampling import NOISE_SHAPE, Toy
from subject_patches.toy.scenes import EMBLEM, sample_emblem, view
from subject_patches.toy.train import CHECKPOINT
from torch import Tensor

from ..shared.models import difference, generator


@pytest.fixture(scope="module")
def encoder() -> Any:
    made = read_subject_encoder(ENCODER)
    made.modules.float()
    made.vision.model.float()
    return made


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return frozen(CHECKPOINT)


@pytest.fixture(scope="module")
def lesson(parts: tuple[Any, Any], encoder: Any) -> routing.Routing:
    return routing.Routing(parts[0], encoder.vision.model, Words()([""]), encoder.modules)


@pytest.fixture(scope="module")
def router(encoder: Any) -> Any:
    torch.manual_seed(1)
    return routing.new_router(encoder.modules)


@pytest.fixture(scope="module")
def store(parts: tuple[Any, Any], encoder: Any) -> groups.Groups:
    made = groups.Groups(parts[1], encoder.vision.model, np.random.default_rng(5), 6)
    made.add(6)
    return made


def test_a_scene_shows_its_emblems() -> None:
    """Each at the place that is told, at most one thing besides, and none of the ground's colours."""
    rng = np.random.default_rng(3)
    for count in (1, 2, 3):
        emblems = [sample_emblem(rng) for _ in range(count)]
        drawn, places = groups.scene_of(emblems, rng)
        assert [drawn.scene.things[place].emblem for place in places] == emblems
        assert count <= len(drawn.scene.things) <= count + 1
        assert drawn.scene.caption.count(EMBLEM) >= count or "emblems" in drawn.scene.caption
        assert not {emblem.plate_colour for emblem in emblems} & set(drawn.scene.background.colours)


def test_a_group_has_a_reference_for_each_of_its_emblems(store: groups.Groups, parts: tuple[Any, Any]) -> None:
    batch = store.rows(torch.arange(6))
    counts = batch.present.sum(1)
    assert 1 <= int(counts.min()) < int(counts.max()) <= groups.MOST
    for kind in (batch.emblems, batch.mask):
        inside = kind.amax((2, 3))
        assert bool((inside[batch.present] > 0.9).all())
        assert not inside[~batch.present].any()
    assert batch.seen.shape == (6, 3, 145, 96)
    assert not torch.equal(batch.seen[:, 0], batch.seen[:, 1])
    assert torch.equal(batch.inside[:, 0], (batch.emblems.sum(1) > 0.3).float())
    known = groups.Groups(parts[1], store.vision, np.random.default_rng(1), 2, known=2)
    known.add(2)
    assert known.draw(2).present.sum(1).tolist() == [2, 2]


def test_the_loss_reaches_the_router_alone(lesson: routing.Routing, router: Any, store: groups.Groups) -> None:
    """Every part of it, by both errors: the noise's alone reaches what the refined maps are made of."""
    torch.manual_seed(4)
    batch = store.draw(3, generator(4))
    lesson.loss(router, batch).backward()
    assert [name for name, each in router.named_parameters() if each.grad is None] == []
    assert all(each.grad is None for each in (*lesson.unet.parameters(), *lesson.encoder.parameters()))
    router.zero_grad()
    timestep, noise = lesson.drawn_noise(batch)
    guess, routed = lesson.predicted(router, batch, lesson.noised(batch.latents, noise, timestep), timestep)
    guess.square().mean().backward(retain_graph=True)
    reached = {name for name, each in router.named_parameters() if each.grad is not None and each.grad.any()}
    assert any("refined" in name for name in reached)
    assert any(name.startswith("qformer") for name in reached)
    assert not any("coarse" in name for name in reached)
    router.zero_grad()
    # Who is not there has no place.
    assert not batch.present.all()
    there = torch.cat([batch.present, torch.ones(3, 1, dtype=torch.bool)], 1)
    assert all(bool(there.gather(1, each.argmax(1)).all()) for *both, _ in routed.maps.values() for each in both)
    # Maps come of what the layers before have drawn, which they do not teach.
    site = list(routed.maps)[-1]
    replace(routed, maps={site: routed.maps[site]}).loss(batch.emblems, batch.present).backward()
    reached = {name for name, each in router.named_parameters() if each.grad is not None and each.grad.any()}
    own = ".".join(map(str, site.key))
    assert {name for name in reached if not name.startswith("qformer")} == {
        f"{own}.{name}" for name, _ in module_at(router, site).named_parameters()
    }
    router.zero_grad()


@torch.no_grad()
def test_a_router_that_is_right_is_measured_so(lesson: routing.Routing, router: Any, store: groups.Groups) -> None:
    """The overlaps are of every subject that is there, of each layer; the log says them for each scale."""
    batch = store.rows(torch.arange(4))
    found = lesson.overlaps(router, batch, 400)
    assert set(found) == set(routing.MEASURED)
    assert all(len(each) == int(batch.present.sum()) for pair in found.values() for each in pair)
    told = lesson.told(router, batch)
    assert told.count("/") == 1 + 3 * len(routing.LOGGED)


@torch.no_grad()
def test_the_shipped_router_finds_held_out_emblems(parts: tuple[Any, Any], encoder: Any) -> None:
    """Of two in a scene each its own, where noise is low: shared out by chance they would have no third of it."""
    held_out = groups.Groups(parts[1], encoder.vision.model, np.random.default_rng((2**41, 8)), 12, known=2)
    held_out.add(12)
    lesson = routing.Routing(parts[0], encoder.vision.model, Words()([""]), encoder.modules)
    found = lesson.overlaps(encoder.router.model.float(), held_out.rows(torch.arange(12)), 100)
    coarse, refined = found[routing.MEASURED[1]]
    assert float(coarse.mean()) > 0.4
    assert float(refined.mean()) > 0.4


def test_training_writes_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run writes the encoder's file with a router in it, and another goes on; a router is put into another
    file of the encoder as it is."""
    monkeypatch.setattr(pair_training, "HELD_OUT", 2)
    given = Namespace(
        seed=0, batch=2, start=None, folder=tmp_path, minutes=0, steps=None, resume=False,
        checkpoint=tmp_path / "r.safetensors", encoder=ENCODER, toy=CHECKPOINT, join=False, rate=1e-3,
        store=16, every=5,
    )  # fmt: skip
    train_router.train(given, Peers())
    first = torch.load(tmp_path / "router.state", weights_only=True)["step"]
    made, plain = read_subject_encoder(given.checkpoint), read_subject_encoder(ENCODER)
    weights = made.modules.state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in plain.modules.state_dict().items())
    given.resume, given.minutes = True, 0.02
    train_router.train(given, Peers())
    assert torch.load(tmp_path / "router.state", weights_only=True)["step"] > first
    target, without = tmp_path / "joined.safetensors", tmp_path / "without.safetensors"
    joined = Namespace(**{**vars(given), "join": True, "start": given.checkpoint, "checkpoint": target})
    train_router.train(joined, Peers())
    one, other = (read_subject_encoder(path).router.model.state_dict() for path in (given.checkpoint, target))
    assert all(torch.equal(one[name], other[name]) for name in one)
    without_router(without)
    joined.start = without
    with pytest.raises(SystemExit, match="has no router"):
        train_router.train(joined, Peers())


def without_router(path: Path) -> None:
    """The encoder's file as the first stage writes it."""
    from subject_patches.toy.train_subjects import write

    encoder = read_subject_encoder(ENCODER)
    write(encoder.modules, encoder.vision.model, path)


def test_what_is_trained_is_what_acts(lesson: routing.Routing, router: Any, encoder: Any, tmp_path: Path) -> None:
    """One call of the host's sampler with the file that the training writes gives the training's own prediction, with
    two subjects in their places. The maps are so decided that the chance in the training's choice decides nothing."""
    with torch.no_grad():
        for name, each in router.named_parameters():
            if name.endswith("refined.to_z.weight"):
                each.mul_(3e4)
    router.half().float()
    train_router.write(router, encoder, tmp_path / "toy.safetensors")
    toy, made = Toy.load(), read_subject_encoder(tmp_path / "toy.safetensors")
    seen: dict[str, Tensor] = {}

    def keep(arguments: dict[str, Any]) -> Tensor:
        seen.update({name: arguments[name] for name in ("cond_denoised", "sigma", "input")})
        return arguments["cond"]

    with torch.inference_mode():
        who, cut = (), []
        for seed in (1, 2):
            drawn = draw(view(sample_emblem(np.random.default_rng(seed)), np.random.default_rng(seed)))
            picture, mask = torch.from_numpy(drawn.image).float()[None] / 255, torch.from_numpy(drawn.masks[:1]).float()
            who += SubjectNode.made([picture], toy.vae, "", size=96, margin=0.15, mask=[mask]).args[0]
            reference = who[-1].references[0]
            cut.append(segmented(reference.image, reference.pixel_mask, 96))
        coded = EncodeSubjectsNode.execute(who, made, toy.vae).args[0]
        by = RouteByEncoderNode.execute(made, early=LEARNED).args[0]
        patched = RoutedReferenceAttentionNode.execute(toy.model, coded, by).args[0]
        patched.set_model_sampler_cfg_function(keep, disable_cfg1_optimization=True)
        noise, text = torch.randn(1, *NOISE_SHAPE, generator=generator(6)), "an emblem and an emblem on grass"
        comfy.sample.sample(
            patched, noise, 1, 4.0, "euler", "normal", toy.encode([text]), toy.encode([""]),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        sigma = seen["sigma"].view(-1, 1, 1, 1)
        timestep = patched.get_model_object("model_sampling").timestep(seen["sigma"])
        planes, inside = (torch.cat(each)[None] for each in zip(*cut, strict=True))
        batch = groups.GroupBatch(
            torch.zeros(1, *NOISE_SHAPE), Words()([text]), torch.ones(1, 2, dtype=torch.bool),
            torch.zeros(1, 2, 16, 16), toy.vae.encode((planes[0] / 2 + 0.5).movedim(1, -1))[None],
            resize_mask(inside[0], (12, 12))[None], encoder.vision.model(planes[0], intermediate_output=-2)[1][None],
        )  # fmt: skip
        given = seen["input"] / (sigma**2 + 1) ** 0.5
        ours, routed = lesson.predicted(router, batch, given, timestep, torch.float32)
        theirs = (seen["input"] - seen["cond_denoised"]) / sigma
    places = [int(refined.argmax(1).unique().numel()) for _, refined, _ in routed.maps.values()]
    assert max(places) > 1
    assert difference(theirs, ours) < 5e-3
