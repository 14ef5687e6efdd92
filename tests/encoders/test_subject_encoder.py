"""An encoder for U-Nets: its file, what its modules compute, and what its nodes make of a subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import load_file
from subject_patches.encoders.reference_net import ENTRANCE, build, delivering, first_weights, hidden_states
from subject_patches.encoders.segmented import segmented
from subject_patches.encoders.subject_encoder import SubjectEncoder, read_subject_encoder
from subject_patches.encoders.vision import seen
from subject_patches.nodes.anystory_subject import LoadAnyStoryNode
from subject_patches.nodes.model_files import SUBJECT_ENCODERS
from subject_patches.nodes.semantic_injection import LoadSemanticInjectionNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.nodes.subject_encoder import (
    REFERENCES,
    TOKENS,
    EncodeSubjectsNode,
    LoadSubjectEncoderNode,
)
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.image_prompt import in_file_order
from subject_patches.patches.mechanisms.subject import Reference, Subject
from subject_patches.patches.parts.masks import tokens_inside
from torch import Tensor

from ..shared.models import difference, generator, randn
from ..shared.small_vaes import noting_vae, small_vae
from ..shared.subject_encoders import SIZE, VISION, file_for, form_for, written

pytestmark = pytest.mark.usefixtures("in_inference_mode")


@pytest.fixture(scope="module")
def path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("encoder") / "small.safetensors", *file_for(model))


@pytest.fixture(scope="module")
def encoder(path: Path) -> SubjectEncoder:
    return read_subject_encoder(path)


def pictured(seed: int = 0, size: tuple[int, int] = (40, 64)) -> Subject:
    """A subject with a picture and a mask of its left two thirds."""
    image = torch.rand(1, *size, 3, generator=generator(seed))
    mask = torch.zeros(1, *size)
    mask[:, 5:-5, : 2 * size[1] // 3] = 1
    latents = randn(1, 4, size[0] // 8, size[1] // 8, seed=seed)
    return Subject((Reference(image, latents, None, mask, cut_out=True),), "subject")


# The picture that an encoder sees


def test_what_is_cut_out_and_around_is_zero() -> None:
    """The picture keeps its form in the middle of the square; the rest of it, and all outside the mask, is zero."""
    image, mask = torch.rand(1, 4, 8, 3, generator=generator(1)), torch.zeros(1, 4, 8)
    mask[:, :, :3] = 1
    planes, inside = segmented(image, mask, 8, (0.4, 0.5, 0.6), (0.2, 0.5, 1.0))
    assert planes.shape == (1, 3, 8, 8)
    assert torch.equal(inside[0], torch.nn.functional.pad(mask[0], (0, 0, 2, 2)))
    expected = (image[0, :, :3] - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.5, 1.0])
    assert torch.allclose(planes[0, :, 2:6, :3], expected.movedim(-1, 0), atol=1e-6)
    assert not (planes * (1 - inside[:, None])).any()
    larger, whole = segmented(image, torch.ones_like(mask), 32)
    assert larger.shape == (1, 3, 32, 32)
    assert float(whole[0, 16, 16]) == 1
    assert float(whole[0, 0, 0]) == 0


# Modules


def test_reference_net_begins_as_the_unet_without_its_cross_attention(model: Any) -> None:
    """With the U-Net's weights and a mask channel of zeros its hidden states are those that the U-Net has where nothing
    of its cross-attention is added, whatever the mask; of every self-attention but the first."""
    unet, form = model.model.diffusion_model, form_for(model)
    network = build(form.unet)
    network.load_state_dict(first_weights(unet.state_dict(), form.latent_channels))
    assert not any("attn2" in name or "norm2" in name for name in network.state_dict())
    latents, sites = randn(2, 4, 6, 9, seed=4), delivering(attention_sites(model))
    assert len(sites) == sum(site.kind == "self" for site in attention_sites(model)) - 1
    found = hidden_states(network, latents, torch.rand(2, 6, 9), sites)
    expected: dict[Any, Tensor] = {}

    def note(normed: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        expected[(*extra["block"], extra["block_index"])] = normed
        return normed, context, value

    options = {"patches": {"attn1_patch": [note], "attn2_output_patch": [lambda output, extra: 0 * output]}}
    context = randn(2, 5, form.context, seed=6)
    unet(latents, torch.zeros(2), context=context, transformer_options=options)
    assert set(found) == set(sites)
    for site, (normed, grid) in found.items():
        assert normed.shape[1] == grid[0] * grid[1]
        assert difference(normed, expected[site.key]) < 1e-5
    network.get_parameter(ENTRANCE).data[:, -1] = 1.0
    changed = hidden_states(network, latents, torch.rand(2, 6, 9), sites)
    assert all(not torch.equal(changed[site][0], found[site][0]) for site in sites)


# The file


def test_a_file_is_read_as_it_was_written(model: Any, path: Path, encoder: SubjectEncoder) -> None:
    """Every tensor comes back bit for bit, whatever reads it, and so does what it makes of a subject."""
    tensors = load_file(path)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision.")}
    assert all(torch.equal(encoder.modules.state_dict()[name], tensor) for name, tensor in own.items())
    assert encoder.modules.state_dict().keys() == own.keys()
    again = read_subject_encoder(path)
    latents, mask = randn(1, 4, 8, 8, seed=1), torch.ones(1, 8, 8)
    one, other = (each.references(latents, mask) for each in (encoder, again))
    assert all(torch.equal(a, b) for site in one for a, b in zip(one[site], other[site], strict=True))


def without(name: str) -> Callable[..., None]:
    return lambda tensors, about: tensors.pop(name)


def told(**values: str) -> Callable[..., None]:
    return lambda tensors, about: about.update(values)


QUERY = "qformer.layers.0.0.to_q.weight"
FAULTS: dict[str, tuple[Callable[..., None], str]] = {
    "a tensor less": (without(QUERY), r"1 of its tensors are missing, qformer.layers.0.0.to_q.weight among them"),
    "a tensor more": (
        lambda tensors, about: tensors.update({"router.x": torch.zeros(1)}),
        r"1 of its tensors are unknown, router.x among them",
    ),
    "another shape": (
        lambda tensors, about: tensors.update({QUERY: torch.zeros(2, 2)}),
        r"it has qformer.layers.0.0.to_q.weight of shape \[2, 2\] where its sizes ask for \[16, 16\]",
    ),
    "vision of another size": (
        lambda tensors, about: tensors.update({"vision.layernorm.bias": torch.zeros(5)}),
        r"it has vision.layernorm.bias of shape \[5\] where its sizes ask for \[32\]",
    ),
    "vision untold": (lambda tensors, about: about.pop("vision"), r"does not say of which kind its vision model is"),
    "a strange vision": (told(vision='{"model_type": "other"}'), r"what it says of its vision model is not whole"),
    "another kind": (told(kind="anystory"), r"it is no subject encoder of a U-Net"),
    "another version": (told(version="9"), r"it is of version 9 where this pack reads 1"),
    "no form": (told(form="{}"), r"its metadata are broken"),
    "no U-Net": (told(form=""), r"its metadata are broken"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_whole_is_refused(model: Any, tmp_path: Path, fault: str) -> None:
    tensors, about = file_for(model)
    change, said = FAULTS[fault]
    change(tensors, about)
    with pytest.raises(ValueError, match=rf"'a.safetensors' cannot be loaded as a subject encoder: .*{said}"):
        read_subject_encoder(written(tmp_path / "a.safetensors", tensors, about))


def test_a_shape_that_no_unet_has_is_refused() -> None:
    with pytest.raises(ValueError, match="shape is not one that a U-Net can have"):
        build('{"latent_channels": 4, "model_channels": 32, "channel_mult": []}')
    with pytest.raises(ValueError, match="it has hidden_size, which are not a U-Net's"):
        build('{"latent_channels": 4, "hidden_size": 32}')


# The nodes


def test_a_new_loader_has_a_file_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that has several kinds: the first one would be refused by two of the three nodes."""
    names = ("a.safetensors", "anylogo-toy.safetensors", "anystory-toy.safetensors", "anystory_flux.safetensors")
    for name in names:
        (tmp_path / name).touch()
    places = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, SUBJECT_ENCODERS.name, places)
    for node, first in (
        (LoadSemanticInjectionNode, names[1]),
        (LoadSubjectEncoderNode, names[2]),
        (LoadAnyStoryNode, names[3]),
    ):
        (file,) = node.define_schema().inputs
        assert file.options[0] == first
        assert sorted(file.options) == [*names]


def test_the_nodes_load_and_encode(model: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the models folder is loaded, and a subject gets, for the model's layers, tokens of what the vision
    model sees and keys and values of what the VAE sees, both cut out, at the places of its mask."""
    places = ([str(path.parent)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, SUBJECT_ENCODERS.name, places)
    encoder = LoadSubjectEncoderNode.execute(path.name).args[0]
    assert LoadSubjectEncoderNode.fingerprint_inputs(path.name)[0] == path.name
    with pytest.raises(ValueError, match=r"There is no safetensors file 'none.safetensors'"):
        LoadSubjectEncoderNode.execute("none.safetensors")
    who, vae = pictured(), noting_vae()
    made = EncodeSubjectsNode.execute((who,), encoder, vae).args[0][0]
    (picture,) = vae.given
    reference = who.references[0]
    planes, inside = segmented(reference.image, reference.pixel_mask, SIZE)
    assert torch.allclose(picture.movedim(-1, 1), planes / 2 + 0.5)
    latents = vae.encode(picture) * model.model.latent_format.scale_factor
    small = torch.nn.functional.avg_pool2d(inside, 8)
    (kept,) = made.encoded.references
    for site, (key, value, grid) in encoder.modules.references(latents, small).items():
        chosen = tokens_inside(small, grid)[0]
        assert torch.equal(kept.ready[site][0], key[:, chosen])
        assert torch.equal(kept.ready[site][1], value[:, chosen])
    pixels = segmented(reference.image, reference.pixel_mask, 48, VISION["image_mean"], VISION["image_std"])[0]
    for shown, given in ((made.encoded.prompt.subject, pixels), (made.encoded.prompt.empty, torch.zeros(1, 3, 48, 48))):
        prompts = encoder.modules.prompts(seen(encoder.vision, given))
        assert all(torch.equal(shown[n][0], prompts[site][0]) for n, site in enumerate(in_file_order(prompts)))
    assert EncodeSubjectsNode.execute((who,), encoder, vae, TOKENS).args[0][0].encoded.references == ()
    assert EncodeSubjectsNode.execute((who,), encoder, vae, REFERENCES).args[0][0].encoded.prompt is None
    assert EncodeSubjectsNode.execute((), encoder, vae).args[0] == ()


def test_what_cannot_be_encoded_is_said(model: Any, encoder: SubjectEncoder) -> None:
    """In one sentence each: no mask, no vision model, another one, and a VAE of another kind."""
    plain = Subject((Reference(torch.rand(1, 32, 32, 3), randn(1, 4, 4, 4), None),), "")
    with pytest.raises(ValueError, match="Picture 1 of subject 2 has no mask"):
        EncodeSubjectsNode.execute((pictured(), plain), encoder, small_vae())
    # Whatever its form, of which some are filled up to what the VAE takes.
    for height in (64, 43):
        image = torch.rand(1, height, 64, 3)
        masks = ((), [torch.ones(1, height, 64)])
        bare, cut = (SubjectNode.made([image], small_vae(), size=64, mask=mask).args[0] for mask in masks)
        with pytest.raises(ValueError, match="Picture 1 of subject 1 has no mask"):
            EncodeSubjectsNode.execute(bare, encoder, small_vae())
        assert EncodeSubjectsNode.execute(cut, encoder, small_vae()).args[0][0].encoded.references
    blind = replace(encoder, vision=None)
    with pytest.raises(ValueError, match=r"'small.safetensors' brings no vision model, and none is connected"):
        EncodeSubjectsNode.execute((pictured(),), blind, small_vae())
    assert EncodeSubjectsNode.execute((pictured(),), blind, small_vae(), REFERENCES).args[0][0].encoded.references
    with pytest.raises(ValueError, match=r"reads pictures of 4 channels; connect the VAE"):
        EncodeSubjectsNode.execute((pictured(),), encoder, small_vae(3))
    with pytest.raises(ValueError, match="The vae input is None"):
        EncodeSubjectsNode.execute((pictured(),), encoder, None)
    with pytest.raises(ValueError, match="parts are 'all'; choose one of"):
        EncodeSubjectsNode.execute((pictured(),), encoder, small_vae(), "all")
    wide = replace(encoder, form=replace(encoder.form, features=64))
    with pytest.raises(ValueError, match=r"reads 64 channels of a vision model, but the one connected gives 32"):
        EncodeSubjectsNode.execute((pictured(),), wide, small_vae())
