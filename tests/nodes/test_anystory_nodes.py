"""Load AnyStory, AnyStory Subject and AnyStory as a graph has them, with small vision and style models of the host."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import convert
import folder_paths
import pytest
import torch
from comfy.t2i_adapter.adapter import StyleAdapter
from subject_patches.encoders.anystory import AnyStory
from subject_patches.encoders.preprocessing import latent_pixels, places, to_bytes
from subject_patches.nodes.anystory import AnyStoryNode
from subject_patches.nodes.anystory_subject import NONE, AnyStorySubjectNode, LoadAnyStoryNode, check_latents
from subject_patches.nodes.model_files import SUBJECT_ENCODERS, register_folders
from subject_patches.patches.anystory.anystory_subject import AnyStorySubject
from subject_patches.tests.shared.small_vaes import noting_vae, small_vae
from torch import Tensor

from ..shared.anystory_files import publish, redux
from ..shared.anystory_models import golden_anystory, golden_model
from ..shared.anystory_runs import sample
from ..shared.anystory_watch import Watch
from ..shared.dit_models import dit_model
from ..shared.models import difference, small_model
from ..shared.small_vision import siglip

pytestmark = pytest.mark.usefixtures("in_inference_mode")


def picture(seed: int = 3, channels: int = 3) -> Tensor:
    image = torch.rand(1, 60, 90, channels, generator=torch.Generator().manual_seed(seed))
    return (image * 255).round() / 255


def mask() -> Tensor:
    inside = torch.zeros(1, 60, 90)
    inside[:, 10:50, 20:50] = 1
    return inside


def encoded(seed: int = 3, **values: Any) -> tuple[AnyStorySubject, ...]:
    given = {"image": picture(seed), "mask": mask(), "vae": small_vae(), "clip_vision": siglip(), "size": 64, **values}
    given = {"anystory": golden_anystory(), "style_model": comfy.sd.StyleModel(redux()), **given}
    return AnyStorySubjectNode.execute(**given).args[0]


def patched(model: Any, subjects: tuple[AnyStorySubject, ...], **values: Any) -> Any:
    return AnyStoryNode.execute(model, golden_anystory(), subjects, **values).args[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return golden_model()


@pytest.fixture(scope="module")
def subjects() -> tuple[AnyStorySubject, ...]:
    """Two."""
    with torch.inference_mode():
        return encoded(4, others=encoded(3))


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the models folder that the pack made the host know; another file under the name is another value."""
    folder = SUBJECT_ENCODERS.name
    register_folders()
    register_folders()
    paths, _ = folder_paths.folder_names_and_paths[folder]
    assert len([path for path in paths if Path(path).name == folder]) == 1
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path)], {".safetensors"}))
    convert.convert(publish(tmp_path / "small.bin"), tmp_path / "small.safetensors")
    assert folder_paths.get_filename_list(folder) == ["small.safetensors"]
    (anystory,) = LoadAnyStoryNode.execute("small.safetensors").args
    assert anystory.form == golden_anystory().form
    before = LoadAnyStoryNode.fingerprint_inputs("small.safetensors")
    (tmp_path / "small.safetensors").write_bytes(b"")
    assert LoadAnyStoryNode.fingerprint_inputs("small.safetensors") != before
    with pytest.raises(ValueError, match=r"'small\.safetensors' cannot be loaded as AnyStory's weights"):
        LoadAnyStoryNode.execute("small.safetensors")
    with pytest.raises(
        ValueError, match=r"There is no safetensors file 'gone\.safetensors' in the models folder subject_encoders"
    ):
        LoadAnyStoryNode.execute("gone.safetensors")


def test_subject_without_cropping_is_the_authors_preprocessing() -> None:
    """The VAE sees their pixels; tokens, router tokens and the mask have their shapes."""
    vae = noting_vae()
    grey = mask() * 0.5
    (subject,) = encoded(vae=vae, crop=NONE, mask=grey)
    pixels, shares = latent_pixels(to_bytes(picture()[0]), to_bytes(grey[0]), 64)
    assert difference(2 * vae.given[0].movedim(-1, 1) - 1, pixels) < 1e-6
    assert torch.equal(subject.inside, places(shares, (4, 4)))
    assert subject.tokens.shape == (1, 81, 32)
    assert subject.router.shape == (1, 9, 32)
    assert subject.latents.shape == (1, 4, 8, 8)


def test_subject_is_cut_out() -> None:
    """The mask's box becomes the square, so that most of it is inside; opacity stands for a mask."""
    (whole,) = encoded(crop=NONE)
    (cut,) = encoded()
    assert cut.inside.sum() > whole.inside.sum()
    transparent = torch.cat([picture(), mask()[..., None]], -1)
    (other,) = encoded(image=transparent, mask=None)
    assert difference(other.tokens, cut.tokens) < 1e-5


def test_a_mask_of_another_size() -> None:
    """It is brought to the picture's."""
    large = torch.nn.functional.interpolate(mask()[None], scale_factor=2)[0]
    assert difference(encoded(mask=large)[0].tokens, encoded()[0].tokens) < 1e-5


@pytest.mark.parametrize(
    "values",
    [
        {"subjects": ()},
        {"token_scale": 0.0, "reference_start": 0.4, "reference_end": 0.4},
        {"token_start": 0.3, "reference_end": 0.0},
    ],
    ids=["no subject", "scale 0", "empty windows"],
)
def test_nothing_to_do_changes_no_bit(values: dict[str, Any], model: Any, subjects: Any) -> None:
    given = {"subjects": subjects, **values}
    assert torch.equal(sample(patched(model, **given)), sample(model))


def test_each_part_changes_the_picture(model: Any) -> None:
    """Tokens, references, the router, the mask, the shift and both LoRAs, each by itself."""
    # Not cut out, so that the mask leaves some of the reference out.
    subjects = encoded(4, others=encoded(3, crop=NONE), crop=NONE)
    pictures = [
        sample(patched(model, subjects, **values), steps=4)
        for values in (
            {},
            {"token_scale": 0.0},
            {"reference_end": 0.0},
            {"router": "off"},
            {"reference_mask": False},
            {"reference_shift": -1.0},
            {"reference_lora": 0.5},
            {"router_lora": 0.0},
        )
    ]
    pictures.append(sample(model, steps=4))
    pairs = [(i, j) for i in range(len(pictures)) for j in range(i)]
    assert [pair for pair in pairs if difference(pictures[pair[0]], pictures[pair[1]]) < 1e-4] == []


def test_router_with_one_subject_changes_nothing(model: Any, subjects: Any) -> None:
    """It is left out, and with several 'auto' is on."""
    one, router = subjects[:1], {"router": "on"}
    assert torch.equal(sample(patched(model, one, **router)), sample(patched(model, one, router="off")))
    assert torch.equal(sample(patched(model, subjects)), sample(patched(model, subjects, **router)))


def test_a_subject_is_looked_at_once(model: Any, subjects: Any) -> None:
    """Alone or with others, in another node and with another scale, its cache has it; a subject that was left out of a
    run is looked at when it comes."""
    watch = Watch()
    with watch.over(model.model.diffusion_model):
        fresh = encoded(7)
        for shown in (fresh, (*fresh, *subjects[:1]), (*subjects[:1], *fresh)):
            sample(patched(model, shown, token_scale=0.1 * len(shown)))
        looked = watch.looks
        sample(patched(model, (*fresh, *subjects[:1])))
    assert looked <= 2
    assert watch.looks == looked


def refused(message: str, **values: Any) -> None:
    with pytest.raises(ValueError, match=message):
        encoded(**values)


def test_subject_sentences() -> None:
    """Each says what is wrong and what to do."""
    refused("mask is empty", mask=torch.zeros(1, 60, 90))
    refused("mask is empty", mask=torch.zeros(1, 60, 90), crop=NONE)
    refused("There is no mask; connect one", mask=None)
    refused("There are 2 pictures; AnyStory takes one a subject", image=picture().expand(2, -1, -1, -1))
    refused("There are 3 masks", mask=mask().expand(3, -1, -1))
    refused("The vae input is None", vae=None)
    refused("The size is 100; give a multiple of 16", size=100)
    refused("The cache_megabytes are -1; give a number from 0 to 65536", cache_megabytes=-1)
    refused("style model is not FLUX.1 Redux", style_model=comfy.sd.StyleModel(StyleAdapter(width=32, num_head=2)))
    refused("style model is not FLUX.1 Redux", style_model=None)
    refused("vision model could not be loaded", clip_vision=None)
    refused("vision model gives 36 tokens of 16 channels", clip_vision=siglip(16))
    wide = comfy.sd.StyleModel(type(redux())(12, 40))
    refused("Redux model makes 40 channels of 12, but AnyStory's weights are for 32 of 12", style_model=wide)
    refused(r"the shape \(1, 16, 8, 8\), but AnyStory's FLUX takes pictures of 4 channels; connect", vae=small_vae(16))
    with pytest.raises(
        ValueError, match=r"the shape \(1, 4, 1, 8, 8\), but AnyStory's FLUX takes pictures of 4 channels"
    ):
        check_latents(golden_anystory(), torch.zeros(1, 4, 1, 8, 8))


def test_an_upside_down_mask_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        encoded()
        assert "upside down" not in caplog.text
        encoded(mask=1 - mask())
    assert "The subject's mask covers 78% of its picture, its edge included. If it is upside down, put" in caplog.text


def test_model_sentences(model: Any, subjects: Any) -> None:
    """Another family, a FLUX of other sizes, too many subjects, numbers beyond bounds."""

    def refuses(message: str, model: Any = model, subjects: Any = subjects, **values: Any) -> None:
        with pytest.raises(ValueError, match=message):
            patched(model, subjects, **values)

    refuses(r"weights are for FLUX\.1, but this model is of SD 1\.x", small_model())
    refuses(r"weights are for FLUX\.1, but this model is of Chroma", dit_model("Chroma"))
    refuses("are for a FLUX of 2 and 2 blocks, 64 wide, with 16 channels a patch", dit_model("FLUX.1"))
    refuses("AnyStory shows one to 8 subjects, but there are 9", subjects=subjects[:1] * 9)
    foreign = replace(subjects[0], latents=torch.zeros(1, 16, 8, 8))
    refuses("VAE gives latents of the shape .* takes pictures of 4 channels", subjects=(foreign,))
    refuses("token_scale is -1", token_scale=-1.0)
    refuses("reference_shift is nan", reference_shift=float("nan"))
    refuses("router_lora is 11", router_lora=11.0)
    refuses("The reference_start is 2", reference_start=2.0)
    refuses("starts at 0.5, after its end at 0.3", token_start=0.5)
    refuses("router is 'perhaps'", router="perhaps")


def test_weights_of_another_file(model: Any, subjects: Any) -> None:
    """Subjects that another file's sizes encoded are refused by their sizes."""
    other = AnyStory("other", replace(golden_anystory().form, context=48), golden_anystory().patcher)
    with pytest.raises(ValueError, match="'other' are for a FLUX"):
        AnyStoryNode.execute(model, other, subjects)
