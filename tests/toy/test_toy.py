"""The toy: its data is pure and says what it shows, its shapes are the host's, and only it is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.supported_models
import numpy as np
import pytest
import torch
from subject_patches.toy import dit_family, family
from subject_patches.toy.data import Words, mixed_scene
from subject_patches.toy.dit_family import ToyDit
from subject_patches.toy.drawing import draw
from subject_patches.toy.family import ToyDiffusion
from subject_patches.toy.judge import caption_score, load_judge
from subject_patches.toy.labels import LABELS, ROWS, SCORES, UNLABELLED, label_loss, labels_of, outlines, unpacked
from subject_patches.toy.sampling import Toy
from subject_patches.toy.scenes import LARGE, Background, describe, sample_emblem, sample_scene, view
from subject_patches.toy.shapes import PLATES, SHAPES
from subject_patches.toy.train_diffusion import (
    THING_WEIGHT,
    Model,
    encode_text,
    initialise,
    initialise_words,
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
    """Each latent cell's label is the thing that fills it; emblems have a plate, and no words for colour or texture."""
    picture = draw(sample_scene(np.random.default_rng(11), 2, 0.0))
    labels = labels_of(picture)[: len(LABELS)]
    for thing, mask in zip(picture.scene.things, picture.masks, strict=True):
        inside = mask.reshape(16, 8, 16, 8).all((1, 3))
        assert inside.any()
        values = [LABELS[kind].index(getattr(thing, kind)) for kind in ("shape", "colour", "texture")]
        assert (labels[:, inside] == np.array([*values, UNLABELLED], dtype=np.uint8)[:, None]).all()
    assert (labels[:, ~picture.masks.any(0).reshape(16, 8, 16, 8).any((1, 3))] == UNLABELLED).all()
    emblem = sample_emblem(np.random.default_rng(3))
    labels = labels_of(draw(view(emblem, np.random.default_rng(4))))
    shown = labels[0] != UNLABELLED
    assert shown.any()
    expected = [LABELS["shape"].index("emblem"), UNLABELLED, UNLABELLED, LABELS["plate"].index(emblem.plate)]
    assert (labels[: len(LABELS), shown] == np.array(expected, dtype=np.uint8)[:, None]).all()


def test_outlines_are_kept_as_bits() -> None:
    """What the labels keep of where things, emblems and glyphs are is what was drawn, place for place."""
    scenes = [sample_scene(np.random.default_rng(seed), 2, 0.5) for seed in range(12)]
    assert any(len({thing.emblem is None for thing in scene.things}) == 2 for scene in scenes)
    for picture in map(draw, scenes):
        found = unpacked(torch.from_numpy(labels_of(picture))[None])[0]
        whole = found.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2).reshape(3, 64, 64).bool().numpy()
        assert (whole == outlines(picture)).all()
        are = [thing.emblem is not None for thing in picture.scene.things]
        assert (whole[0] == picture.masks.any(0)[::2, ::2]).all()
        assert (whole[1] == picture.masks[are].any(0)[::2, ::2]).all()
        assert not (whole[2] & ~whole[1]).any()


def test_a_glyph_is_where_its_colour_is() -> None:
    """A glyph's outline tells two emblems of one plate and colours apart, as far as they differ."""
    emblem = replace(sample_emblem(np.random.default_rng(3)), cells=(True,) * 8 + (False,) * 8)
    turned = replace(emblem, cells=emblem.cells[::-1])
    scene = view(emblem, np.random.default_rng(4))
    thing = replace(scene.things[0], angle=0.0, x=64.0, y=64.0, radius=40.0)
    upper, lower = (
        outlines(draw(replace(scene, things=(replace(thing, emblem=each),))))[2] for each in (emblem, turned)
    )
    assert upper[:32].sum() > 4 * upper[32:].sum() > 0
    assert lower[32:].sum() > 4 * lower[:32].sum() > 0


def test_the_label_loss_falls_when_the_scores_are_right() -> None:
    """Scores that name what each cell shows cost nearly nothing, and a batch without things costs nothing."""
    scenes = (sample_scene(np.random.default_rng(11), 2, share) for share in (0.0, 1.0))
    labels = torch.from_numpy(np.stack([labels_of(draw(scene)) for scene in scenes])).long()
    parts = [
        torch.nn.functional.one_hot(labels[:, row].clamp(max=len(names) - 1), len(names)).movedim(-1, 1) * 20.0
        for row, names in enumerate(LABELS.values())
    ]
    thing, _, glyph = unpacked(labels).unbind(1)
    scores = torch.cat([*parts, thing * 40 - 20, glyph * 40 - 20], 1)
    assert scores.shape[1] == SCORES
    assert float(label_loss(scores, labels)) < 1e-3
    sizes = [*map(len, LABELS.values()), 16, 16]
    for row in range(len(sizes)):
        wrong = list(scores.split(sizes, 1))
        wrong[row] = -wrong[row]
        assert float(label_loss(torch.cat(wrong, 1), labels)) > 3
    nothing = torch.full_like(labels, UNLABELLED)
    nothing[:, len(LABELS) :] = 0
    assert float(label_loss(scores, nothing)) == 0


def test_half_of_the_scenes_show_large_emblems() -> None:
    """One, two or twice the same, and only those of the other half have things that are none."""
    scenes = [mixed_scene(np.random.default_rng((9, seed))) for seed in range(400)]
    large = [scene for scene in scenes if all(t.emblem and t.radius >= LARGE for t in scene.things)]
    assert 0.42 < len(large) / 400 < 0.65
    pairs = [scene.things for scene in large if len(scene.things) == 2]
    assert 0.25 < len(pairs) / len(large) < 0.5
    assert 0.4 < np.mean([first.emblem == second.emblem for first, second in pairs]) < 0.8
    assert any(thing.emblem is None for scene in scenes for thing in scene.things)


def test_a_thing_and_its_outline_count_more_than_the_ground() -> None:
    labels = torch.full((1, ROWS, 16, 16), UNLABELLED)
    labels[0, :, 4:6, 7:9] = 0
    weights = thing_weights(labels)
    assert weights.shape == (1, 1, 16, 16)
    assert float(weights.mean()) == pytest.approx(1)
    counts = weights[0, 0] > weights.min()
    assert counts.nonzero().amin(0).tolist() == [3, 6]
    assert int(counts.sum()) == 16
    assert float(weights.max() / weights.min()) == pytest.approx(THING_WEIGHT)
