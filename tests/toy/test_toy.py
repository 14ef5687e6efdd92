"""The toy: its data is pure and says what it shows, its shapes are the host's, and only it is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.supported_models
import numpy as np
import pytest
import torch
from subject_patches.toy import dit_family, family
from subject_patches.toy.data import LABELS, UNLABELLED, Words, labels_of
from subject_patches.toy.dit_family import ToyDit
from subject_patches.toy.drawing import draw
from subject_patches.toy.family import ToyDiffusion
from subject_patches.toy.judge import caption_score, load_judge
from subject_patches.toy.sampling import Toy
from subject_patches.toy.scenes import Background, describe, sample_emblem, sample_scene, view
from subject_patches.toy.shapes import PLATES, SHAPES
from subject_patches.toy.train_diffusion import (
    THING_WEIGHT,
    Model,
    encode_text,
    initialise,
    initialise_words,
    label_loss,
    thing_weights,
)


@pytest.fixture(scope="module")
def toy() -> Toy:
    """The shipped checkpoint, as the host loads it."""
    return Toy.load()


def test_scenes_are_pure() -> None:
    """The same seed gives the same scene and bytes; another seed gives others."""
    first, second = (draw(sample_scene(np.random.default_rng(7))) for _ in range(2))
    assert first.scene == second.scene
    assert np.array_equal(first.image, second.image)
    assert not np.array_equal(first.image, draw(sample_scene(np.random.default_rng(8))).image)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_and_masks_fit_the_picture(seed: int) -> None:
    """Every thing is seen, and its box is its mask's."""
    picture = draw(sample_scene(np.random.default_rng((1, seed))))
    for mask, (x0, y0, x1, y1) in zip(picture.masks, picture.boxes, strict=True):
        assert mask.sum() > 80
        assert mask[y0:y1, x0:x1].sum() == mask.sum()
        assert all(edge.any() for edge in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]))


def test_views_show_one_emblem() -> None:
    """Views of an emblem differ in place and ground but not in the emblem."""
    rng = np.random.default_rng(3)
    emblem = sample_emblem(rng)
    views = [view(emblem, rng) for _ in range(4)]
    assert all(v.things[0].emblem == emblem for v in views)
    assert len({(v.things[0].x, v.things[0].angle) for v in views}) == 4


@pytest.mark.parametrize("name", [*SHAPES, *PLATES])
def test_shapes_are_signed(name: str) -> None:
    """Every shape has an inside within its radius and is outside beyond it."""
    v, u = np.mgrid[-1.6:1.6:65j, -1.6:1.6:65j].astype(np.float32)
    distance = {**SHAPES, **PLATES}[name](u, v)
    assert (distance < 0).sum() > 100
    assert (distance[np.hypot(u, v) > 1.35] > 0).all()


def test_captions_name_everything() -> None:
    """A plain description has every thing's words and the background's."""
    scene = sample_scene(np.random.default_rng(5), 2, 0.0, Background("gradient", ("red", "blue")))
    text = describe(scene)
    for thing in scene.things:
        assert thing.shape in text
        assert thing.colour in text
        assert thing.texture == "plain" or thing.texture in text
    assert text.endswith("on a red and blue gradient")


def test_words_are_the_hosts_tokens(toy: Toy) -> None:
    """The trainer's token ids are those of the host's own tokenizer."""
    captions = [sample_scene(np.random.default_rng((2, i))).caption for i in range(50)]
    for caption, row in zip(captions, Words()(captions), strict=True):
        assert row.tolist() == [token for token, _ in toy.clip.tokenize(caption)["l"][0]]


def test_trained_text_encoder_is_the_hosts() -> None:
    """What the trainer differentiates is the host's own text model."""
    torch.manual_seed(0)
    model, tokens = Model(), Words()(["a red star and an emblem on grass"])
    initialise(model)
    initialise_words(model, tokens.unique())
    torch.testing.assert_close(encode_text(model.text.text_model, tokens), model.text.text_model(tokens)[0])


@pytest.mark.parametrize(("own", "register"), [(ToyDiffusion, family.register), (ToyDit, dit_family.register)])
def test_no_real_checkpoint_is_taken_for_a_toy(own: Any, register: Callable[[], None]) -> None:
    """No family of the host has a description that a toy's would match, a toy is asked before the host's own that would
    take it, as FLUX would the DiT, and registering twice changes nothing."""
    register()
    families = list(comfy.supported_models.models)
    register()
    assert comfy.supported_models.models == families
    assert families.count(own) == 1
    for each in families:
        if each is not own:
            assert not own.matches(each.unet_config), each.__name__
            if each.matches(own.unet_config):
                assert families.index(own) < families.index(each)


def test_loader_finds_the_toy(toy: Toy) -> None:
    """The host's detection takes the shipped checkpoint for the toy and gives it eight latent channels."""
    assert isinstance(toy.model.model.model_config, ToyDiffusion)
    assert toy.model.model.latent_format.latent_channels == 8
    assert toy.vae.latent_channels == 8


def test_autoencoder_keeps_pictures(toy: Toy) -> None:
    """Pictures survive the autoencoder with at least 24 dB on average."""
    pictures = np.stack([draw(sample_scene(np.random.default_rng((4, i)))).image for i in range(16)])
    images = torch.from_numpy(pictures).float() / 255
    error = (toy.vae.decode(toy.vae.encode(images))[..., :3].clamp(0, 1) - images).square().mean((1, 2, 3))
    assert float((-10 * error.log10()).mean()) > 24


def test_prompts_are_obeyed(toy: Toy) -> None:
    """The judge finds a prompt's ground, its colour and its whole thing (shape, colour and texture) far more often in
    its own picture than in another prompt's."""
    scenes = [sample_scene(np.random.default_rng((5, i)), 1, 0.0) for i in range(24)]
    readings = load_judge().findings(toy.sample([describe(s) for s in scenes], list(range(24)), steps=12))

    def right(other: int) -> tuple[float, float, float]:
        pairs = list(zip(readings, scenes[other:] + scenes[:other], strict=True))
        grounds = [reading.background == scene.background.kind for reading, scene in pairs]
        colours = [scene.things[0].colour in {found.colour for found in reading.objects} for reading, scene in pairs]
        things = [caption_score(reading, scene.things, scene.background).all_things for reading, scene in pairs]
        return float(np.mean(grounds)), float(np.mean(colours)), float(np.mean(things))

    for what, own, other in zip(("ground", "colour", "thing"), right(0), right(1), strict=True):
        assert own > other + 0.3, what


def test_labels_are_what_the_cells_show() -> None:
    """Each latent cell's label is the thing that fills it; emblems have a shape and no words for colour or texture."""
    picture = draw(sample_scene(np.random.default_rng(11), 2, 0.0))
    labels = labels_of(picture)
    for thing, mask in zip(picture.scene.things, picture.masks, strict=True):
        inside = mask.reshape(16, 8, 16, 8).all((1, 3))
        assert inside.any()
        values = [names.index(getattr(thing, kind)) for kind, names in LABELS.items()]
        assert (labels[:, inside] == np.array(values, dtype=np.uint8)[:, None]).all()
    assert (labels[:, ~picture.masks.any(0).reshape(16, 8, 16, 8).any((1, 3))] == UNLABELLED).all()
    emblem = labels_of(draw(view(sample_emblem(np.random.default_rng(3)), np.random.default_rng(4))))
    assert (emblem[0] == LABELS["shape"].index("emblem")).any()
    assert (emblem[1:] == UNLABELLED).all()


def test_the_label_loss_falls_when_the_scores_are_right() -> None:
    """Scores that name each cell's thing cost nearly nothing, and a batch without things costs nothing."""
    labels = torch.from_numpy(labels_of(draw(sample_scene(np.random.default_rng(11), 2, 0.0))))[None].long()
    scores = torch.cat(
        [
            torch.nn.functional.one_hot(labels[:, row].clamp(max=len(names) - 1), len(names)).movedim(-1, 1) * 20.0
            for row, names in enumerate(LABELS.values())
        ],
        1,
    )
    assert float(label_loss(scores, labels)) < 1e-3
    assert float(label_loss(-scores, labels)) > 3
    assert float(label_loss(scores, torch.full_like(labels, UNLABELLED))) == 0


def test_a_thing_and_its_outline_count_more_than_the_ground() -> None:
    labels = torch.full((1, len(LABELS), 16, 16), UNLABELLED)
    labels[0, :, 4:6, 7:9] = 0
    weights = thing_weights(labels)
    assert weights.shape == (1, 1, 16, 16)
    assert float(weights.mean()) == pytest.approx(1)
    counts = weights[0, 0] > weights.min()
    assert counts.nonzero().amin(0).tolist() == [3, 6]
    assert int(counts.sum()) == 16
    assert float(weights.max() / weights.min()) == pytest.approx(THING_WEIGHT)
