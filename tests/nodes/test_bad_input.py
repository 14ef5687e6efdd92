"""Bad input ends at node time, in one sentence that says what is wrong, with what, and what to do."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest
import torch
from comfy import supported_models
from hosting.random_models import SMALL, model_of
from subject_patches.nodes.attention_inspector import RecordAttentionNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.mechanisms import MECHANISMS, Mechanism, over_mechanisms
from subject_patches.tests.shared.models import recycled, reference, subject
from subject_patches.tests.shared.other_families import OTHERS

PICTURES = torch.rand(2, 32, 48, 3)


def make_subject(**values: Any) -> Any:
    # Nothing that encodes: all of this must be noticed before it is asked to.
    given = {"image": PICTURES, "vae": object(), "phrase": "", "size": 64, "margin": 0.1, **values}
    return SubjectNode.execute(**{name: [value] for name, value in given.items()})


# Subject


@pytest.mark.parametrize("mask", [torch.zeros(1, 32, 48), torch.full((2, 32, 48), 0.5), torch.zeros(32, 48)])
def test_empty_mask(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask is empty: no place of its 48 x 32 .*Paint the subject white, or inv"):
        make_subject(mask=mask)


def test_one_empty_mask_among_several() -> None:
    mask = torch.zeros(2, 32, 48)
    with pytest.raises(ValueError, match="mask is empty"):
        make_subject(mask=mask, image=PICTURES)


@pytest.mark.parametrize("count", [3, 5])
def test_mask_count(count: int) -> None:
    with pytest.raises(ValueError, match=rf"There are {count} masks for 2 pictures; give one for all, or one for each"):
        make_subject(mask=torch.ones(count, 32, 48))


@pytest.mark.parametrize("size", [56, 2056])
def test_size_beyond_the_inputs(size: int) -> None:
    with pytest.raises(ValueError, match=f"The size is {size}; give a number from 64 to 2048"):
        make_subject(size=size)


def test_checkpoint_without_vae() -> None:
    with pytest.raises(ValueError, match=r"The vae input is None, .* load one with Load VAE"):
        make_subject(vae=None)


@pytest.mark.parametrize("margin", [-0.1, 1.5, math.nan])
def test_margin(margin: float) -> None:
    with pytest.raises(ValueError, match=rf"margin is {margin}; give a number from 0 to 1"):
        make_subject(margin=margin)


def test_transparent_picture_without_anything_on_it() -> None:
    picture = torch.rand(1, 32, 48, 4)
    picture[..., 3] = 0
    with pytest.raises(ValueError, match="mask is empty"):
        make_subject(image=picture)


# Recycled Self-Attention


@pytest.mark.parametrize("name", ["strength", "keep_probability"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, 10.5])
def test_numbers_out_of_range(name: str, value: float, model: Any) -> None:
    most = {"strength": "10", "keep_probability": "1"}[name]
    with pytest.raises(ValueError, match=rf"The {name} is {value}; give a number from 0 to {most}\."):
        recycled(model, **{name: value})


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (0.6, 0.4, r"The window starts at 0\.6, after its end at 0\.4; swap the two"),
        (-0.1, 0.4, r"start_percent is -0\.1; give a number from 0 to 1"),
        (0.0, 1.1, r"end_percent is 1\.1; give a number from 0 to 1"),
        (math.nan, 1.0, r"start_percent is nan; give a number from 0 to 1"),
    ],
)
def test_window(start: float, end: float, message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        recycled(model, start_percent=start, end_percent=end)


def test_a_black_region_is_told(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As Load Image gives one of an opaque picture; not where nothing would show anyway."""
    black, said = torch.zeros(1, 64, 64), "The region mask is black everywhere, so the subject shows nowhere: paint"
    with caplog.at_level(logging.WARNING):
        recycled(model, strength=0.0, region_mask=black)
        assert said not in caplog.text
        recycled(model, region_mask=black)
    assert said in caplog.text


def test_who_sees_the_reference(model: Any) -> None:
    with pytest.raises(ValueError, match=r"The apply_to is 'all'; choose one of cond only, both\."):
        recycled(model, apply_to="all")


def test_subject_of_another_vae(model: Any) -> None:
    who = subject(reference(), reference(channels=16))
    with pytest.raises(ValueError, match=r"VAE of 16 latent channels but this model takes 4; connect the VAE of this"):
        recycled(model, (who,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sites": "named", "named_sites": "output.9"}, r"'output\.9' names no self-attention of this model; it has "),
        (
            {"sites": "named", "named_sites": " , "},
            r"blocks but none is named; write for example: middle, output\.3\.$",
        ),
        ({"sites": "everything"}, r"one of usual, decoder, encoder, encoder and decoder, named, not 'everything'"),
    ],
)
def test_sites(values: dict[str, Any], message: str, model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        recycled(model, **values)


# Families

KNOWN = (
    "it knows SD 1.x, SD 2.x, SDXL, SDXL refiner, FLUX.2, Chroma, FLUX.1, Z-Image, Lumina 2, Krea 2, Qwen-Image, "
    "Anima, Cosmos-Predict2, Wan, HiDream, SD 3.5"
)


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("strength", [0.0, 1.0])
@over_mechanisms
def test_other_families_are_refused_by_name(mechanism: Mechanism, family: str, strength: float) -> None:
    with pytest.raises(ValueError, match=rf"family {family}; {KNOWN}"):
        mechanism.on(OTHERS[family], strength=strength)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_not_recorded(family: str) -> None:
    with pytest.raises(ValueError, match=rf"family {family}; {KNOWN}"):
        RecordAttentionNode.execute(OTHERS[family])


def test_models_that_only_look_like_a_family() -> None:
    """To the host they are of one: SD 2.x's upscaler, whose self-attentions read the prompt, and Wan's models that are
    shown pictures."""
    ones = [1, 1, 1, 1]
    upscaler = {**SMALL, "channel_mult": ones, "num_res_blocks": ones, "transformer_depth": ones}
    upscaler["transformer_depth_output"] = 2 * ones
    others = (model_of(supported_models.SD_X4Upscaler, upscaler), dit_model("Wan", in_dim=36))
    for other in (*others, dit_model("Wan", in_dim_ref_conv=16)):
        with pytest.raises(ValueError, match=KNOWN):
            RecordAttentionNode.execute(other)


# What every mechanism refuses: one sentence, with the value and a remedy behind a semicolon

SENTENCE = r"^[^;]* (is|at) {value}\b[^;]*; [^;]+\.$"


@over_mechanisms
@pytest.mark.parametrize("strength", [math.nan, math.inf, -0.5])
def test_strengths_beyond_bounds(mechanism: Mechanism, strength: float, model: Any) -> None:
    # What a mechanism's strength stands for may count the other way, or in another unit.
    with pytest.raises(ValueError, match=SENTENCE.format(value=r"(nan|-?inf|-0\.\d+|1\.5)")):
        mechanism.on(model, strength=strength)


@over_mechanisms
@pytest.mark.parametrize("end", [1.1, math.nan, -0.1])
def test_windows_beyond_the_schedule(mechanism: Mechanism, end: float, model: Any) -> None:
    with pytest.raises(ValueError, match=SENTENCE.format(value=re.escape(str(end)))):
        mechanism.patch(model, (subject(),), 1.0, (0.0, end))


@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS if m.begins], ids=lambda m: m.name)
@pytest.mark.parametrize(("window", "value"), [((0.6, 0.4), 0.4), ((-0.1, 0.4), -0.1), ((math.nan, 1.0), math.nan)])
def test_windows_that_begin_wrongly(
    mechanism: Mechanism, window: tuple[float, float], value: float, model: Any
) -> None:
    with pytest.raises(ValueError, match=SENTENCE.format(value=re.escape(str(value)))):
        mechanism.patch(model, (subject(),), 1.0, window)


@pytest.mark.parametrize("mechanism", [m for m in MECHANISMS if m.lends], ids=lambda m: m.name)
def test_references_of_another_vae(mechanism: Mechanism, model: Any) -> None:
    with pytest.raises(ValueError, match=r"^[^;]*\b16 latent channels but this .* 4; [^;]+\.$"):
        mechanism.on(model, (subject(reference(channels=16)),))
