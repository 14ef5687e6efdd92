"""IP-Adapter files of their published form as image prompts, against the authors' formula written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import save_file
from subject_patches.nodes.image_prompt import EncodeImagePromptNode, LoadImagePromptAdapterNode
from subject_patches.nodes.routed_reference import SubjectShareNode
from subject_patches.nodes.router import RouteByMasksNode
from subject_patches.patches.families import attention_sites
from subject_patches.patches.families.unet import layer_at
from subject_patches.patches.mechanisms.subject import Share, Subject
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from ..shared.models import (
    CONTEXT,
    difference,
    generator,
    mask_router,
    prompt,
    routed,
    sample,
    subject,
)
from ..shared.small_vision import CLIP, PROJECTED, WIDTH, clip_vision, siglip

HEADS, HEAD, QUERIES, PLAIN_TOKENS = 2, 64, 5, 4
INNER = HEADS * HEAD
Tensors = dict[str, Tensor]


def random(source: torch.Generator, *shape: int, scale: float = 0.3) -> Tensor:
    return torch.randn(shape, generator=source) * scale


def plain(source: torch.Generator) -> Tensors:
    wide = PLAIN_TOKENS * CONTEXT
    return {
        "image_proj.proj.weight": random(source, wide, PROJECTED),
        "image_proj.proj.bias": random(source, wide),
        "image_proj.norm.weight": 1 + random(source, CONTEXT),
        "image_proj.norm.bias": random(source, CONTEXT),
    }


def plus(source: torch.Generator, depth: int = 2, width: int = 24) -> Tensors:
    tensors = {
        "latents": random(source, 1, QUERIES, width),
        "proj_in.weight": random(source, width, WIDTH),
        "proj_in.bias": random(source, width),
        "proj_out.weight": random(source, CONTEXT, width),
        "proj_out.bias": random(source, CONTEXT),
        "norm_out.weight": 1 + random(source, CONTEXT),
        "norm_out.bias": random(source, CONTEXT),
    }
    for layer in range(depth):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            tensors[f"layers.{layer}.{norm}.weight"] = 1 + random(source, width)
            tensors[f"layers.{layer}.{norm}.bias"] = random(source, width)
        tensors[f"layers.{layer}.0.to_q.weight"] = random(source, INNER, width)
        tensors[f"layers.{layer}.0.to_kv.weight"] = random(source, 2 * INNER, width)
        tensors[f"layers.{layer}.0.to_out.weight"] = random(source, width, INNER)
        tensors[f"layers.{layer}.1.1.weight"] = random(source, 4 * width, width)
        tensors[f"layers.{layer}.1.3.weight"] = random(source, width, 4 * width)
    return {f"image_proj.{name}": tensor for name, tensor in tensors.items()}


def full(source: torch.Generator) -> Tensors:
    return {
        "image_proj.proj.0.weight": random(source, WIDTH, WIDTH),
        "image_proj.proj.0.bias": random(source, WIDTH),
        "image_proj.proj.2.weight": random(source, CONTEXT, WIDTH),
        "image_proj.proj.2.bias": random(source, CONTEXT),
        "image_proj.proj.3.weight": 1 + random(source, CONTEXT),
        "image_proj.proj.3.bias": random(source, CONTEXT),
    }


FORMS = {"plain": plain, "plus": plus, "full": full}


def tokens_by_hand(tensors: Tensors, form: str, output: Any) -> Tensor:
    """What the authors' modules compute of a vision model's output, in float64."""
    w = {name.removeprefix("image_proj."): tensor.double() for name, tensor in tensors.items()}
    if form == "plain":
        tokens = linear(output["image_embeds"].double(), w["proj.weight"], w["proj.bias"]).reshape(1, -1, CONTEXT)
        return layer_norm(tokens, (CONTEXT,), w["norm.weight"], w["norm.bias"])
    x = output["penultimate_hidden_states"].double()
    if form == "full":
        x = linear(gelu(linear(x, w["proj.0.weight"], w["proj.0.bias"])), w["proj.2.weight"], w["proj.2.bias"])
        return layer_norm(x, (CONTEXT,), w["proj.3.weight"], w["proj.3.bias"])
    x, latents = linear(x, w["proj_in.weight"], w["proj_in.bias"]), w["latents"]
    for n in range(2):

        def norm(tensor: Tensor, name: str, n: int = n) -> Tensor:
            return layer_norm(tensor, tensor.shape[-1:], w[f"layers.{n}.{name}.weight"], w[f"layers.{n}.{name}.bias"])

        seen = norm(latents, "0.norm2")
        both = torch.cat([norm(x, "0.norm1"), seen], 1)
        query = linear(seen, w[f"layers.{n}.0.to_q.weight"])
        key, value = linear(both, w[f"layers.{n}.0.to_kv.weight"]).chunk(2, -1)
        heads = []
        for head in range(HEADS):
            part = slice(head * HEAD, (head + 1) * HEAD)
            shares = (query[..., part] @ key[..., part].mT / HEAD**0.5).softmax(-1)
            heads.append(shares @ value[..., part])
        latents = latents + linear(torch.cat(heads, -1), w[f"layers.{n}.0.to_out.weight"])
        inner = gelu(linear(norm(latents, "1.0"), w[f"layers.{n}.1.1.weight"]))
        latents = latents + linear(inner, w[f"layers.{n}.1.3.weight"])
    latents = linear(latents, w["proj_out.weight"], w["proj_out.bias"])
    return layer_norm(latents, (CONTEXT,), w["norm_out.weight"], w["norm_out.bias"])


def published_order(model: Any) -> list[Any]:
    """A U-Net's cross-attention layers as diffusers numbers them: down blocks, up blocks, middle block."""
    sites = [site for site in attention_sites(model) if site.kind == "cross"]
    return [site for block in ("input", "output", "middle") for site in sites if site.block == block]


def file_of(model: Any, form: str, seed: int = 7) -> Tensors:
    source = generator(seed)
    tensors = FORMS[form](source)
    for number, site in enumerate(published_order(model)):
        layer = layer_at(model.model.diffusion_model, site)
        for part in "kv":
            name = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
            tensors[name] = random(source, layer.heads * layer.dim_head, CONTEXT)
    return tensors


@pytest.fixture(scope="module")
def vision() -> Any:
    return clip_vision()


@pytest.fixture
def load(tmp_path: Any) -> Callable[[Tensors], Any]:
    """Writes tensors as a file in the host's adapter folder, and loads it with the node."""
    folder_paths.add_model_folder_path("ipadapter", str(tmp_path))

    def write(tensors: Tensors, name: str = "adapter.safetensors") -> Any:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / name)
        return LoadImagePromptAdapterNode.execute(name).args[0]

    yield write
    folder_paths.folder_names_and_paths["ipadapter"][0].remove(str(tmp_path))


def everywhere() -> Any:
    return RouteByMasksNode.execute(masks=torch.ones(1, 8, 8)).args[0]


def encoded(adapter: Any, vision: Any, subjects: tuple[Subject, ...], **values: Any) -> tuple[Subject, ...]:
    return EncodeImagePromptNode.execute(subjects, adapter, vision, **values).args[0]


def silent(**values: Any) -> Subject:
    """A subject whose references are not shown."""
    return subject(strength=0.0, **values)


def by_hand(model: Any, tensors: Tensors, shown: Tensor, empty: Tensor, scale: float) -> Any:
    """The authors' decoupled cross-attention in the host's own slots: the text's attention, and `scale` times that over
    the picture's tokens, in the unconditional pass over those of no picture. Told apart by the prompts' lengths."""
    patched = model.clone()
    for number, site in enumerate(published_order(model)):
        weights = [tensors[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"].double() for part in "kv"]

        def attend(query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any], weights: Any = weights) -> Tensor:
            heads = extra["n_heads"]
            rows = []
            for index, which in enumerate(extra["cond_or_uncond"]):
                tokens = shown if which == 0 else empty
                size = len(query) // len(extra["cond_or_uncond"])
                own = slice(index * size, (index + 1) * size)
                pairs = [(key[own], value[own], 1.0), (tokens @ weights[0].mT, tokens @ weights[1].mT, scale)]
                rows.append(sum(_attention(query[own], k, v, heads) * share for k, v, share in pairs))
            return torch.cat(rows).to(query)

        patched.set_model_attn2_replace(attend, *site.key)
    return patched


def _attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    q, k, v = (t.double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (shares @ v).transpose(1, 2).flatten(2)


def empty_output(vision: Any) -> dict[str, Tensor]:
    size = CLIP["image_size"]
    states = vision.model(pixel_values=torch.zeros(1, 3, size, size), intermediate_output=-2)[1]
    return {"image_embeds": torch.zeros(1, PROJECTED), "penultimate_hidden_states": states}


@pytest.mark.parametrize("form", FORMS)
def test_a_published_file_computes_what_its_authors_do(form: str, model: Any, vision: Any, load: Any) -> None:
    tensors = file_of(model, form)
    (shown,) = encoded(load(tensors), vision, (silent(),), background="kept")
    with torch.inference_mode():
        output = vision.encode_image(shown.references[0].image, crop=True)
        tokens = tokens_by_hand(tensors, form, output)
        empty = tokens_by_hand(tensors, form, empty_output(vision))
    expected = sample(by_hand(model, tensors, tokens, empty, 0.7))
    ours = sample(routed(model, (shown,), everywhere(), eta=0.7))
    assert difference(expected, sample(model)) > 0.02
    assert difference(ours, expected) < 1e-5


def test_a_subject_without_pictures_is_left_as_it_is(model: Any, vision: Any, load: Any) -> None:
    """As Subject Reference makes one of no picture."""
    empty = Subject((), "subject", silent().cache, Share())
    assert encoded(load(file_of(model, "plain")), vision, (empty,)) == (empty,)


def test_it_shows_in_the_subjects_places(model: Any, vision: Any, load: Any) -> None:
    adapter = load(file_of(model, "plus"))
    two = encoded(adapter, vision, (silent(), silent(seed=1, phrase="scene")))
    plain_picture = sample(model)
    assert difference(sample(routed(model, two, mask_router(2))), plain_picture) > 0.01
    # Each of the two is shown, and where it is: exchanged, the picture is another.
    swapped = sample(routed(model, two[::-1], mask_router(2)))
    assert difference(swapped, sample(routed(model, two, mask_router(2)))) > 1e-3
    assert torch.equal(sample(routed(model, two, mask_router(2), eta=0.0)), plain_picture)


def test_without_its_background_it_does_not_see_it(model: Any, vision: Any, load: Any) -> None:
    adapter = load(file_of(model, "plus"))
    base = subject()
    (reference,) = base.references
    mask = torch.zeros(1, *reference.image.shape[1:3])
    mask[:, :, : mask.shape[2] // 2] = 1
    changed = torch.where(mask[..., None] == 1, reference.image, torch.rand_like(reference.image))

    def keys(image: Tensor, background: str) -> Tensor:
        one = Subject((replace(reference, image=image, pixel_mask=mask),), "subject", base.cache, Share())
        return encoded(adapter, vision, (one,), background=background, crop="none")[0].share.prompt.subject[0][0]

    assert torch.equal(keys(reference.image, "removed"), keys(changed, "removed"))
    assert difference(keys(reference.image, "kept"), keys(changed, "kept")) > 1e-3


def test_share_keeps_the_adapters_prompt(model: Any, vision: Any, load: Any) -> None:
    shown = encoded(load(file_of(model, "plain")), vision, (subject(),))
    (shared,) = SubjectShareNode.execute(shown, strength=0.5).args[0]
    assert shared.share.prompt is shown[0].share.prompt
    (other,) = SubjectShareNode.execute(shown, image_prompt=prompt(3)).args[0]
    assert other.share.prompt is not shown[0].share.prompt


def without(tensors: Tensors, *parts: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "ip_adapter"), "is no IP-Adapter: it has no tensors named"),
        (lambda t: without(t, "ip_adapter.3.to_v"), "The layers in .* are not whole"),
        (lambda t: without(t, "image_proj"), "has no projection of the plain, plus or full form"),
        (lambda t: without(t, "layers.1.0.to_kv"), r"does not fit .* missing, image_proj.layers.1.0.to_kv.weight"),
        (lambda t: without(t, "proj_in.weight"), "The projection in .* is not whole"),
        (lambda t: {**t, "image_proj.norm_out.weight": torch.ones(3)}, r"norm_out.weight of shape \[3\] where"),
        (lambda t: {**t, "image_proj.perceiver_resampler.x": torch.ones(3)}, "is a face adapter"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else(change: Any, message: str, model: Any, load: Any) -> None:
    with pytest.raises(ValueError, match=message):
        load(change(file_of(model, "plus")))


def test_a_file_that_cannot_be_read(tmp_path: Any, load: Any) -> None:
    (tmp_path / "cut.safetensors").write_bytes(b'\x10\0\0\0\0\0\0\0{"a"')
    with pytest.raises(ValueError, match=r"'cut.safetensors' cannot be read as safetensors"):
        LoadImagePromptAdapterNode.execute("cut.safetensors")
    with pytest.raises(ValueError, match=r"There is no safetensors file 'missing.safetensors'"):
        LoadImagePromptAdapterNode.execute("missing.safetensors")


def test_a_model_or_vision_model_that_is_another(model: Any, vision: Any, load: Any) -> None:
    adapter = load(file_of(model, "plus"))
    wide = clip_vision(hidden_size=16, intermediate_size=24)
    with pytest.raises(ValueError, match=r"reads the hidden states of a CLIP vision model, 32 channels, but .* 16"):
        encoded(adapter, wide, (subject(),))
    # One that pools nothing gives as many channels, of each token.
    with pytest.raises(ValueError, match=r"reads the pooled output of .* connected gives one for each of its tokens;"):
        encoded(load(file_of(model, "plain"), "plain.safetensors"), siglip(PROJECTED), (subject(),))
    tensors = file_of(model, "plus")
    fewer = load(without(tensors, "ip_adapter.1."), "fewer.safetensors")
    shown = encoded(fewer, vision, (subject(),))
    with pytest.raises(ValueError, match=r"The adapter 'fewer.safetensors' is for prompts of .* layers"):
        routed(model, shown)
    other = load(file_of(model, "plain"), "other.safetensors")
    both = (*encoded(other, vision, (subject(),)), *encoded(adapter, vision, (subject(),)))
    with pytest.raises(ValueError, match="different adapters"):
        routed(model, both)
