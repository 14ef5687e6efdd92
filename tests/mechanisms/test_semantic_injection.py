"""AnyLogo's semantic injection: which layer takes which group, its equations by hand, its file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.supported_models
import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import save_file
from subject_patches.encoders.semantic_injection import hierarchy, tensors_of
from subject_patches.encoders.weights import metadata
from subject_patches.nodes.semantic_injection import LoadSemanticInjectionNode
from subject_patches.patches.engine.call import AttentionCall
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.families import attention_sites
from subject_patches.patches.families.unet import layer_at, scales
from subject_patches.patches.mechanisms.semantic_injection import (
    SemanticInjection,
    grouped,
    injected,
    layers_of,
    tokens_of,
)
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.models import CONTEXT, difference, prompt, randn, sample, small_model, subject
from subject_patches.tests.shared.semantics import FEATURES, VISION, contents, maps_of, semantics_for, told, vision
from subject_patches.tests.shared.small_vision import siglip
from torch import Tensor
from torch.nn import functional

RUN: dict[str, Any] = {"steps": 2}


# Which layer takes which group


def groups_by_name(model: Any) -> dict[str, int]:
    groups = grouped(attention_sites(model), scales(model.model.diffusion_model))
    return {str(site): group for site, group in groups.items()}


def test_groups_are_mirrored_over_the_scales(model: Any) -> None:
    """The finest scale has the shallowest group in encoder and decoder, the middle block the deepest."""
    network = model.model.diffusion_model
    by_scale: dict[tuple[int, int], set[int]] = {}
    seen: dict[str, tuple[int, int]] = {}

    def note(query: Tensor, context: Any, value: Any, options: dict[str, Any]) -> tuple[Tensor, Any, Any]:
        block, number = options["block"]
        seen[f"{block}.{number}.{options['block_index']}"] = tuple(options["activations_shape"][-2:])
        return query, context, value

    noted = model.clone()
    noted.set_model_attn2_patch(note)
    sample(noted, size=(16, 16), steps=1)
    groups = groups_by_name(model)
    assert seen.keys() == {name if name.count(".") == 2 else f"{name}.0" for name in groups}
    for name, group in groups.items():
        if not name.startswith("middle"):
            by_scale.setdefault(seen[name if name.count(".") == 2 else f"{name}.0"], set()).add(group)
    assert [by_scale[size] for size in sorted(by_scale, reverse=True)] == [{n} for n in range(len(by_scale))]
    assert groups["middle.0.0"] == 3
    assert scales(network)["input", 0] == 0


def test_the_groups_of_stable_diffusion() -> None:
    """SD 1.5's, whose scales are four: 64 x 64 has the 6th block's of 24, 32 x 32 the 12th, 16 x 16 the 18th, the
    middle, 8 x 8, the 24th."""
    config = {**comfy.supported_models.SD15.unet_config, "image_size": 32, "in_channels": 4, "out_channels": 4}
    config |= {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4], "context_dim": 768, "num_heads": 8}
    config |= {"transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1}
    config |= {"transformer_depth_output": [1] * 9 + [0] * 3, "use_spatial_transformer": True, "legacy": False}
    with torch.device("meta"):
        network = UNetModel(**config, operations=comfy.ops.disable_weight_init)
    found = scales(network)
    assert [found["input", number] for number in (1, 2, 4, 5, 7, 8)] == [0, 0, 1, 1, 2, 2]
    assert [found["output", number] for number in range(3, 12)] == [2, 2, 2, 1, 1, 1, 0, 0, 0]
    assert layers_of(24) == (6, 12, 18, 24)
    assert layers_of(8) == (2, 4, 6, 8)
    assert layers_of(40) == (10, 20, 30, 40)


# Equations


def test_tokens_are_patches_and_one_of_the_background() -> None:
    weight, bias = randn(5, 3, seed=1), randn(5, seed=2)
    first, second, scene = ((randn(1, 4, 3, seed=n), randn(1, 3, seed=10 + n)) for n in range(3))
    made = tokens_of({2: (weight, bias)}, [(first,) * 4, (second,) * 4], (scene,) * 4)
    assert made.keys() == {2}
    by_hand = torch.cat([first[0], second[0], scene[1][:, None]], 1) @ weight.T + bias
    assert torch.allclose(made[2], by_hand, atol=1e-6)
    assert tokens_of({0: (weight, bias)}, [(first,) * 4], None)[0].shape == (1, 4, 5)


def test_strength_and_place() -> None:
    output, term = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    assert torch.equal(injected(output, term, 1.0, True), term)
    assert torch.allclose(injected(output, term, 0.5, True), (output + term) / 2)
    assert torch.allclose(injected(output, term, 0.5, False), output + term / 2)


@pytest.mark.parametrize("replaces", [False, True])
def test_an_edit_by_hand(model: Any, replaces: bool) -> None:
    """A layer's own projections make keys and values of its group's tokens; both attentions, written out."""
    groups = grouped(attention_sites(model), scales(model.model.diffusion_model))
    site = next(site for site in groups if site.block == "middle")
    layer = layer_at(model.model.diffusion_model, site)
    width = layer.heads * layer.dim_head
    query, key, value = randn(1, 6, width, seed=1), randn(1, 7, width, seed=2), randn(1, 7, width, seed=3)
    tokens = {group: randn(1, 5, CONTEXT, seed=group) for group in range(4)}
    chunk = Chunk(slice(0, 1), "positive", True, {}, (8, 8))

    def projected(given: Tensor) -> tuple[Tensor, Tensor]:
        return functional.linear(given, layer.to_k.weight), functional.linear(given, layer.to_v.weight)

    call = AttentionCall(query, key, value, layer.heads, site, chunk, (2, 3), project=projected)
    # Another node's, which stays whichever comes first.
    call.blend(lambda output: output + 1)
    edit = SemanticInjection(frozenset(groups), Window(), tokens, groups, 0.7, replaces)
    edit.amend(call, 1.0, lambda stream: None)

    def attention(k: Tensor, v: Tensor) -> Tensor:
        heads = []
        for head in range(layer.heads):
            part = slice(head * layer.dim_head, (head + 1) * layer.dim_head)
            shares = (query[..., part] @ k[..., part].mT / layer.dim_head**0.5).softmax(-1)
            heads.append(shares @ v[..., part])
        return torch.cat(heads, -1)

    plain, term = attention(key, value), attention(*projected(tokens[3]))
    wanted = 0.3 * plain + 0.7 * term if replaces else plain + 0.7 * term
    for blend in call.blends:
        plain = blend.function(plain)
    assert torch.allclose(plain, wanted + 1, atol=1e-5)


# Runs


def test_only_the_conditioned_pass_sees_it(model: Any) -> None:
    """Eq. 7: at a guidance of 0 nothing of it is left."""
    plain = sample(model, cfg=0.0, **RUN)
    assert difference(sample(told(model, (subject(),)), cfg=0.0, **RUN), plain) < 1e-6
    assert difference(sample(told(model, (subject(),)), **RUN), sample(model, **RUN)) > 1e-3


def test_subject_and_background_count(model: Any) -> None:
    scenes = [torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    results = [
        sample(told(model, given, **more), **RUN)
        for given, more in (
            ((subject(),), {}),
            ((subject(seed=1),), {}),
            ((subject(), subject(seed=1)), {}),
            ((subject(),), {"background": scenes[0]}),
            ((subject(),), {"background": scenes[1]}),
            ((subject(),), {"prompt": "replaced"}),
        )
    ]
    pairs = [(a, b) for number, a in enumerate(results) for b in results[number + 1 :]]
    assert min(difference(a, b) for a, b in pairs) > 1e-4


def test_in_the_prompts_place_the_prompt_does_not_count(model: Any) -> None:
    run = {**RUN, "cfg": 1.0}
    patched = told(model, (subject(),), prompt="replaced")
    one, other = (sample(patched, positive=prompt(seed, pooled_output=None), **run) for seed in (1, 2))
    assert difference(one, other) < 1e-6


# The file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "subject_encoders", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


def test_a_file_loads_as_saved(folder: Path) -> None:
    tensors, about = contents("SD 1.x", CONTEXT, prompt="replaced")
    weights = {f"vision.{key}": each for key, each in vision().model.state_dict().items()}
    save_file({**tensors, **weights}, folder / "anylogo-x.safetensors", {**about, "vision": json.dumps(VISION)})
    (loaded,) = LoadSemanticInjectionNode.execute("anylogo-x.safetensors").args
    assert (loaded.family, loaded.form.prompt) == ("SD 1.x", "replaced")
    assert metadata(loaded.form, "SD 1.x", "nobody") == about
    again = tensors_of(loaded.maps)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    picture = torch.rand(1, 20, 30, 3)
    for mine, theirs in zip(hierarchy(loaded.vision, picture, None), hierarchy(vision(), picture, None), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert mine[0].shape == (1, 16, FEATURES)
        assert mine[1].shape == (1, FEATURES)
    model = small_model()
    by_file = told(model, (subject(),), semantics=loaded, clip_vision=None, prompt="kept")
    assert difference(sample(by_file, **RUN), sample(told(model, (subject(),)), **RUN)) < 1e-6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": None}, "holds no maps of AnyLogo's semantic injection. Take an anylogo-FAMILY"),
        ({"kind": "anystory-unet"}, "holds no maps of AnyLogo's semantic injection"),
        ({"version": "2"}, "is of version 2 where this pack reads 1"),
        ({"form": "{"}, "its metadata are broken"),
        (
            {"form": json.dumps({"context": 4, "features": 4, "groups": [4], "prompt": "kept"})},
            "broken .the sizes 4, 4",
        ),
        ({"form": json.dumps({"context": 4, "features": 4, "groups": [0], "prompt": "so"})}, "broken .the prompt 'so'"),
        ({"vision": json.dumps(VISION)}, "it lacks its vision"),
        ({"semantic.1.bias": None}, "1 of its tensors are missing, semantic.1.bias among them"),
        ({"semantic.2.weight": torch.zeros(3, 4)}, r"has semantic.2.weight of shape \[3, 4\] where its sizes ask for"),
        ({"other.weight": torch.zeros(1)}, "1 of its tensors are unknown, other.weight among them"),
        ({"vision.x": torch.zeros(1)}, "does not say of which kind its vision model is"),
    ],
)
def test_a_wrong_file_is_refused(changed: dict[str, Any], message: str, folder: Path) -> None:
    tensors, about = contents("SD 1.x", CONTEXT)
    for name, value in changed.items():
        holder = tensors if name in tensors or torch.is_tensor(value) else about
        holder[name] = value
    kept = [{name: value for name, value in each.items() if value is not None} for each in (tensors, about)]
    save_file(kept[0], folder / "x.safetensors", kept[1])
    with pytest.raises(ValueError, match=message):
        LoadSemanticInjectionNode.execute("x.safetensors")


def test_what_is_no_file_is_refused(folder: Path) -> None:
    (folder / "bad.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=r"'bad\.safetensors' cannot be loaded as semantic injection: "):
        LoadSemanticInjectionNode.execute("bad.safetensors")
    with pytest.raises(ValueError, match=r"no safetensors file 'none\.safetensors' in the models folder"):
        LoadSemanticInjectionNode.execute("none.safetensors")


# What is refused at a node


def test_another_family_is_refused(model: Any) -> None:
    wrong = maps_of("SDXL", 2048)
    with pytest.raises(ValueError, match=rf"is for SDXL, .* 2048 channels, but this model is SD 1.x with {CONTEXT}"):
        told(model, (subject(),), semantics=wrong)
    with pytest.raises(ValueError, match="is for the scales of a U-Net, but this model is"):
        told(dit_model("FLUX.1"), (), semantics=wrong)
    with pytest.raises(ValueError, match="has no map of group 3"):
        told(model, (subject(),), semantics=semantics_for(model, groups=(0, 1, 2)))


def test_the_vision_model_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"brings no vision model; connect Load CLIP Vision .* DINOv2 of {FEATURES}"):
        told(model, (subject(),), clip_vision=None)
    with pytest.raises(ValueError, match=f"reads a DINOv2 of {FEATURES} channels, but the one connected has 32; load"):
        told(model, (subject(),), clip_vision=vision(32))
    with pytest.raises(ValueError, match="the vision model connected is a siglip_vision_model; load a DINOv2"):
        told(model, (subject(),), clip_vision=siglip())


def test_numbers_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"The strength is 11\.0; give a number from 0 to 10"):
        told(model, (subject(),), strength=11.0)
    with pytest.raises(ValueError, match=r"strength is 1\.5, but where the subject's tokens replace the prompt's"):
        told(model, (subject(),), strength=1.5, prompt="replaced")
    with pytest.raises(ValueError, match="The prompt is 'gone'; choose one of"):
        told(model, (subject(),), prompt="gone")
    with pytest.raises(
        ValueError, match="The background has 2 pictures, but a scene is one; pick one with Get Image from Batch"
    ):
        told(model, (subject(),), background=torch.rand(2, 8, 8, 3))
