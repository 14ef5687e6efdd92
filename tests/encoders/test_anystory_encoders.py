"""AnyStory's encoders: preprocessing and embedders against the authors' numbers, and the loading of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import convert
import numpy as np
import pytest
import torch
from help_pictures import SUBJECT, subject_groups
from host import ROOT
from hosting.sheet import draw_sheet
from PIL import Image
from safetensors.torch import load_file, save_file
from subject_patches.encoders.anystory import AnyStory, embedded, read_anystory, subject_tokens
from subject_patches.encoders.preprocessing import cut_out, latent_pixels, places, to_bytes, vision_pixels
from subject_patches.encoders.weights import FORMAT

from ..shared.anystory_files import publish, redux
from ..shared.golden_cases import Golden, cases_of


@dataclass(frozen=True)
class Pictures(Golden):
    """A picture and its mask, and what the authors' preprocessing made of them."""


@dataclass(frozen=True)
class Embedding(Golden):
    """A vision model's features, and their tokens."""


pictures = cases_of("anystory", Pictures, lambda case: "image_u8" in case.tensors)
embeddings = cases_of("anystory", Embedding, lambda case: "output_size" in case.case)


@pytest.fixture(scope="module")
def anystory(tmp_path_factory: pytest.TempPathFactory) -> AnyStory:
    """The small weights, converted and loaded."""
    folder = tmp_path_factory.mktemp("anystory")
    convert.convert(publish(folder / "small.bin"), folder / "small.safetensors")
    return read_anystory(folder / "small.safetensors")


@pytest.mark.parametrize("golden", pictures, ids=lambda golden: golden.name)
def test_preprocessing_is_the_authors(golden: Pictures, anystory: AnyStory) -> None:
    """Pixels and masks equal theirs in every value, and tokens of their features within float32."""
    t, size = golden.tensors, golden.case["ref_size"]
    picture, mask = t["image_u8"].numpy(), t["mask_u8"].numpy()
    seen = t["siglip_masked_image"].shape[-1]
    pixels, shares = vision_pixels(picture, mask, seen)
    assert torch.equal(pixels, t["siglip_masked_image"])
    grid = (round(t["siglip_mask_27"].shape[1] ** 0.5),) * 2
    inside = places(shares, grid)
    assert torch.equal(inside, t["siglip_mask_27"].squeeze(-1))
    pixels, shares = latent_pixels(picture, mask, size)
    assert torch.equal(pixels, t["vae_masked_image"])
    assert torch.equal(places(shares, (size // 16, size // 16)), t["ref_mask"].squeeze(-1))
    features = t["siglip_last_hidden"]
    own = embedded(features, inside, redux(), anystory.module("redux"), round(t["redux_embeds"].shape[1] ** 0.5))
    side = round(t["router_embeds"].shape[1] ** 0.5)
    router = embedded(features, inside, redux(), anystory.module("router.router_embedder"), side)
    assert (own - t["redux_embeds"]).abs().max() < 2e-5
    assert (router - t["router_embeds"]).abs().max() < 2e-5


@pytest.mark.parametrize("golden", embeddings, ids=lambda golden: golden.name)
def test_embedder_is_the_authors(golden: Embedding, anystory: AnyStory) -> None:
    """A gated average over cells, of any square into any other."""
    t = golden.tensors
    inside = t["mask"].squeeze(-1)
    made = embedded(t["x"], inside, redux(), anystory.module("redux"), golden.case["output_size"])
    assert (made - t["out"]).abs().max() < 2e-5


def test_tokens_of_the_released_sizes(anystory: AnyStory) -> None:
    """81 tokens and 9 of the router; those of cells without the subject are zero."""
    features = torch.randn(1, 27 * 27, anystory.form.vision)
    inside = torch.zeros(1, 27, 27)
    inside[:, :9] = 1
    own, router = subject_tokens(anystory, features, inside.flatten(1), redux())
    assert own.shape == (1, 81, anystory.form.context)
    assert router.shape == (1, 9, anystory.form.context)
    assert [int(tokens.abs().sum(-1).count_nonzero()) for tokens in (own, router)] == [27, 3]


def test_weights_are_the_files(anystory: AnyStory, tmp_path: Path) -> None:
    """Every tensor arrives under its name, in its dtype."""
    path = tmp_path / "half.safetensors"
    convert.convert(publish(tmp_path / "half.bin"), path)
    state = read_anystory(path).patcher.model.state_dict()
    found = load_file(path)
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in found.items())
    assert anystory.rank("ref.transformer.x_embedder") == 4


def test_cut_out_is_a_square_around_the_subject() -> None:
    """4 % wider than the subject, white outside it and beyond the picture's edge."""
    image, mask = np.zeros((60, 90, 3), np.uint8), np.zeros((60, 90), np.uint8)
    image[:] = (10, 20, 30)
    mask[0:51, 20:40] = 201
    mask[55, 80] = 200
    picture, kept = cut_out(image, mask)
    assert picture.shape[:2] == kept.shape == (52, 52)
    assert set(np.unique(kept)) == {0, 255}
    assert int((kept == 255).sum()) == 51 * 20
    assert (picture[kept == 255] == (10, 20, 30)).all()
    assert (picture[kept == 0] == 255).all()
    # One place alone is a picture still.
    single = np.zeros((60, 90), np.uint8)
    single[3, 4] = 255
    assert cut_out(image, single)[1].tolist() == [[255]]


def test_empty_mask_is_a_sentence() -> None:
    """Grey below the authors' threshold counts as nothing."""
    with pytest.raises(ValueError, match=r"mask is empty: none of its 6 x 4 places is above 0\.78"):
        cut_out(np.zeros((4, 6, 3), np.uint8), np.full((4, 6), 200, np.uint8))


def test_bytes_of_pictures() -> None:
    """Pictures that came from bytes go back to the same."""
    values = torch.arange(256) / 255
    assert to_bytes(values).tolist() == list(range(256))


@pytest.mark.parametrize("damage", ["other", "truncated", "version", "sizes", "text"])
def test_wrong_files_are_one_sentence(tmp_path: Path, damage: str) -> None:
    """Each names the file and says what to do."""
    path = tmp_path / "wrong.safetensors"
    convert.convert(publish(tmp_path / "small.bin"), path)
    tensors = load_file(path)
    if damage == "other":
        save_file(tensors, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "version":
        save_file(tensors, path, {"format": FORMAT, "kind": "anystory", "version": "99"})
    elif damage == "sizes":
        about = {"format": FORMAT, "kind": "anystory", "version": "1"}
        save_file({"redux.gate_proj.bias": torch.zeros(1)}, path, about)
    else:
        path.write_text("no weights")
    with pytest.raises(ValueError, match=r"'wrong\.safetensors' cannot be loaded .* tools/convert\.py\.$"):
        read_anystory(path)


def test_the_help_page_shows_what_the_node_makes() -> None:
    """The picture is the one that the command draws now."""
    with Image.open(ROOT / "web" / "docs" / "anystory_subject.jpg") as saved:
        shown = np.asarray(saved.convert("RGB")).astype(float)
    drawn = np.asarray(draw_sheet([(SUBJECT, subject_groups())])).astype(float)
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 2
