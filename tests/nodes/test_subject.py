"""Subject Reference: what becomes of pictures and masks before they are encoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from subject_patches.nodes.align import AlignReferenceNode
from subject_patches.nodes.subject import SubjectNode
from subject_patches.patches.mechanisms.subject import (
    Reference,
    Subject,
    composite,
    fit,
    fitted_size,
    mask_bounds,
)
from subject_patches.patches.parts.cache import MEGABYTE
from subject_patches.tests.shared.models import generator
from subject_patches.tests.shared.small_vaes import NotingVae, noting_vae, small_vae
from torch import Tensor

# As the host runs nodes; what other tests made so is used here, too.
pytestmark = pytest.mark.usefixtures("in_inference_mode")


def made(image: Tensor, vae: NotingVae | None = None, **values: Any) -> tuple[Subject, ...]:
    given = {"phrase": "", "size": 64, "margin": 0.0, **values}
    mask = given.pop("mask", None)
    return SubjectNode.made([image], vae or small_vae(), mask=() if mask is None else [mask], **given).args[0]


def references(image: Tensor, **values: Any) -> tuple[Reference, ...]:
    (subject,) = made(image, **values)
    return subject.references


def pictures(count: int, height: int, width: int, channels: int = 3) -> Tensor:
    return torch.rand(count, height, width, channels, generator=generator(1))


def painted(height: int, width: int, y0: int, y1: int, x0: int, x1: int) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, y0:y1, x0:x1] = 1
    return mask


def test_a_picture_of_the_right_size_is_encoded_as_it_is() -> None:
    vae, image = noting_vae(), pictures(2, 64, 48)
    found = made(image, vae)[0].references
    assert [torch.equal(seen, image[row : row + 1]) for row, seen in enumerate(vae.given)] == [True, True]
    for row, each in enumerate(found):
        assert torch.equal(each.image, image[row : row + 1])
        assert torch.equal(each.latents, small_vae().encode(each.image))
        assert each.mask is None


@pytest.mark.parametrize(("margin", "box"), [(0.0, (10, 26, 20, 52)), (0.25, (2, 34, 12, 60)), (1.0, (0, 40, 0, 72))])
def test_the_picture_is_cropped_to_its_mask(margin: float, box: tuple[int, int, int, int]) -> None:
    """The margin is a share of the subject's longer side, here 32, and ends at the picture's edge."""
    y0, y1, x0, x1 = box
    mask = painted(40, 72, 10, 26, 20, 52)
    assert mask_bounds(mask[0], margin) == (x0, y0, x1, y1)
    image = pictures(1, 40, 72)
    (found,) = references(image, mask=mask, margin=margin, size=72)
    cut, own = fit(image[:, y0:y1, x0:x1], mask[:, y0:y1, x0:x1], 72, 8)
    assert torch.equal(found.image, cut)
    assert found.mask.shape[1:] == found.latents.shape[2:]
    assert float(found.mask.mean()) == pytest.approx(float(own.mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "longer", "size"),
    [
        (40, 80, 64, (32, 64)),
        (80, 40, 64, (64, 32)),
        (30, 30, 96, (96, 96)),
        (2, 900, 64, (1, 64)),
        (33, 50, 64, (42, 64)),
    ],
)
def test_the_aspect_ratio_is_kept(height: int, width: int, longer: int, size: tuple[int, int]) -> None:
    assert fitted_size(height, width, longer) == size


def test_what_is_no_multiple_is_filled_with_the_edge_which_is_not_the_subject() -> None:
    image = pictures(1, 33, 50)
    (found,) = references(image, size=64)
    # 42 x 64 becomes 48 x 64.
    assert found.image.shape == (1, 48, 64, 3)
    assert torch.equal(found.image[:, 42:], found.image[:, 41:42].expand(-1, 6, -1, -1))
    assert found.mask.shape == (1, 6, 8)
    assert found.mask[0, :5].eq(1).all()
    torch.testing.assert_close(found.mask[0, 5], torch.full((8,), 2 / 8))
    assert found.image.min() >= 0
    assert found.image.max() <= 1


def test_transparent_pictures_are_put_on_white_and_bring_their_mask() -> None:
    image = pictures(1, 64, 64, 4)
    image[..., 3] = painted(64, 64, 0, 64, 0, 32)
    flat, mask = composite(image, None)
    assert torch.equal(flat[:, :, :32], image[:, :, :32, :3])
    assert flat[:, :, 32:].eq(1).all()
    assert torch.equal(mask, image[..., 3])
    # Without anything transparent there is no mask, and a given one counts more.
    image[..., 3] = 1
    assert composite(image, None)[1] is None
    given = painted(64, 64, 0, 8, 0, 8)
    image[..., 3] = 0.5
    assert composite(image, given)[1] is given
    half, _ = composite(image, given)
    torch.testing.assert_close(half, image[..., :3] / 2 + 0.5)


def test_each_picture_its_own_mask_or_one_for_all() -> None:
    image = pictures(2, 64, 64)
    masks = torch.cat([painted(64, 64, 0, 32, 0, 64), painted(64, 64, 32, 64, 0, 64)])
    first, second = references(image, mask=masks)
    assert torch.equal(first.image, fit(image[:1, :32], None, 64, 8)[0])
    assert torch.equal(second.image, fit(image[1:, 32:], None, 64, 8)[0])
    for one in (masks[:1], masks[0]):
        first, second = references(image, mask=one)
        assert torch.equal(second.image, fit(image[1:, :32], None, 64, 8)[0])
    # A mask of another size is of the same picture.
    (small,) = references(image[:1], mask=painted(16, 16, 0, 8, 0, 16))
    assert torch.equal(small.image, first.image)


def test_subjects_are_passed_along_in_order_with_caches_of_their_own() -> None:
    first = made(pictures(1, 64, 64), phrase=" red\n dog ", cache_megabytes=3)
    both = made(pictures(1, 64, 64), phrase="cat", others=first)
    assert [each.phrase for each in both] == ["red dog", "cat"]
    assert both[0] is first[0]
    assert both[0].cache is not both[1].cache
    assert first[0].cache.max_bytes == 3 * MEGABYTE


def test_a_list_of_pictures_is_one_subject() -> None:
    """As the host gives lists, of pictures that differ in size, each with its mask."""
    images = [pictures(1, 64, 48), pictures(2, 40, 64)]
    masks = [painted(64, 48, 0, 32, 0, 48), painted(40, 64, 0, 40, 0, 32).expand(2, -1, -1)]
    (subject,) = SubjectNode.execute(images, masks, vae=[small_vae()], size=[64], phrase=["dog"]).args[0]
    alone = [references(image, mask=mask, margin=0.1) for image, mask in zip(images, masks, strict=True)]
    assert len(subject.references) == 3
    for found, right in zip(subject.references, [*alone[0], *alone[1]], strict=True):
        assert torch.equal(found.image, right.image)
        assert torch.equal(found.mask, right.mask)


def test_the_background_is_removed_before_the_encoding() -> None:
    """Outside the mask the VAE sees one shade; what lends its features is the same either way."""
    image, mask = pictures(1, 40, 72), painted(40, 72, 10, 26, 20, 52)
    (kept,), (cut,) = (references(image, mask=mask, margin=0.5, size=64, background=how) for how in ("keep", "gray"))
    inside = cut.pixel_mask[0] == 1
    assert torch.equal(cut.image[0][inside], kept.image[0][inside])
    assert torch.allclose(cut.image[0][cut.pixel_mask[0] == 0], torch.tensor(0.5), atol=1e-4)
    assert not torch.equal(cut.image, kept.image)
    assert torch.equal(cut.mask, kept.mask)
    with pytest.raises(ValueError, match="background is 'red'; choose one of keep, white, gray"):
        references(image, mask=mask, background="red")


def test_pictures_in_half_precision() -> None:
    """As the host gives them with --fp16-intermediates; not every operation of a CPU knows them."""
    image, mask = pictures(1, 200, 160).half(), painted(200, 160, 20, 180, 10, 150).half()
    (half,), (whole,) = (references(each, mask=mask.to(each)) for each in (image, image.float()))
    assert torch.equal(half.latents, whole.latents)
    assert AlignReferenceNode.execute(image, mask).args[0].dtype == torch.float32
