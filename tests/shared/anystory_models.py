"""AnyStory's small golden FLUX in the host's own classes, and its cases as what the pack takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.model_detection
import comfy.samplers
import comfy.supported_models
import convert
import torch
from hosting.random_models import model_of
from measuring.anystory import form_for, random_weights
from safetensors import safe_open
from subject_patches.encoders.anystory import AnyStory, read_anystory
from subject_patches.nodes.anystory import AnyStoryNode
from subject_patches.patches.anystory.anystory_loras import Loras
from subject_patches.patches.anystory.anystory_references import clean_reference
from subject_patches.patches.anystory.anystory_run import AnyStorySettings, add_anystory
from subject_patches.patches.anystory.anystory_subject import AnyStorySubject
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.subject import Subject
from subject_patches.patches.parts.cache import FeatureCache
from torch import Tensor

from .anystory_files import publish
from .golden_cases import Golden, file_of
from .models import randn

_PATCH = 2


@dataclass(frozen=True)
class AnyStoryCase(Golden):
    """A forward or a whole loop."""

    @property
    def looped(self) -> bool:
        return "noise_pred_per_step" in self.tensors

    @property
    def subjects(self) -> int:
        ids = self.tensors["ref_ids" if self.looped else "in.ref_ids"]
        return int((ids == ids[0]).all(-1).sum())

    @property
    def windows(self) -> dict[str, tuple[float, float]]:
        """Those of the subjects' tokens and of the references; what a loop does not say is what the authors take."""
        if self.looped:
            start, end = self.case.get("redux_window", (0.1, 0.3))
            references = self.case.get("ref_start_at", 0.0), self.case.get("ref_end_at", 1.0)
            return {"token_window": (start, end), "reference_window": references}
        shown = (bool(self.case.get(name)) for name in ("use_redux", "use_ref"))
        names = ("token_window", "reference_window")
        return {name: (0.0, float(each)) for name, each in zip(names, shown, strict=True)}

    def picture(self, packed: Tensor) -> Tensor:
        """Tokens (rows, n, channels) of the picture as latents (rows, channels, height, width)."""
        ids = self.tensors["latent_image_ids" if self.looped else "in.img_ids"]
        return unpacked(packed, [int(size) + 1 for size in ids[:, 1:].amax(0)])

    def settings(self, anystory: AnyStory, row: int = 0, caches: Sequence[FeatureCache] = ()) -> AnyStorySettings:
        """What the node would ask for, of one row of the batch."""
        loras = Loras(anystory, 1.0, 1.0)
        given = {name.removeprefix("in."): tensor for name, tensor in self.tensors.items()}
        tokens = given["redux_unscaled"] * self.case.get("redux_scale", 0.6) if self.looped else given["redux"]
        router = "router" in given and (self.looped or self.case.get("use_router"))
        masked = "ref_mask" in given and (self.looped or self.case.get("use_ref_mask"))
        side = given["ref_ids"][: given["ref"].shape[1] // self.subjects, 1:].amax(0) - given["ref_ids"][0, 1:] + 1
        grid = [int(size) for size in side]
        assert torch.equal(given["ref_ids"][0], torch.tensor([0.0, 0.0, -float(grid[1])]))
        shift, references = self.case.get("ref_shift", 0.0), []
        caches = caches or [FeatureCache(2**26) for _ in range(self.subjects)]
        for number, cache_ in enumerate(caches):
            own = slice(number * grid[0] * grid[1], (number + 1) * grid[0] * grid[1])
            mask = _row(given["ref_mask"], row)[:, own, 0] if masked else None
            clean = unpacked(_row(given["ref"], row)[:, own], grid)
            references.append(clean_reference(clean, mask, shift, loras, cache_))
        return AnyStorySettings(
            loras, tuple(f"subject {number + 1}" for number in range(self.subjects)), _row(tokens, row),
            _row(given["router"], row) if router else None, tuple(references), shift=shift, **self.windows,
        )  # fmt: skip

    def prompt(self, row: int = 0) -> list[list[Any]]:
        """The prompt's encoding, of one row of the batch."""
        t = self.tensors
        text, pooled = (_row(t[f"in.{name}"] if f"in.{name}" in t else t[other], row) for name, other in _NAMES)
        guidance = float(t["in.guidance"][0]) if "in.guidance" in t else self.case.get("guidance_scale", 3.5)
        return [[text, {"pooled_output": pooled, "guidance": guidance}]]


_NAMES = (("txt", "prompt_embeds"), ("pooled", "pooled"))


def _row(tensor: Tensor, row: int) -> Tensor:
    return tensor[row : row + 1] if len(tensor) > 1 else tensor


def unpacked(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(rows, n, channels * 4) to (rows, channels, height, width)."""
    rows, (height, width) = len(tokens), grid
    tokens = tokens.view(rows, height, width, -1, _PATCH, _PATCH)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(rows, -1, _PATCH * height, _PATCH * width)


def packed(latents: Tensor) -> Tensor:
    """(rows, channels, height, width) to (rows, n, channels * 4)."""
    tokens = latents.unflatten(3, (-1, _PATCH)).unflatten(2, (-1, _PATCH))
    return tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@cache
def _weights() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(file_of("anystory", "weights_transformer.safetensors"), "pt") as file:
        return json.loads(file.metadata()["config"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def golden_model(**options: Any) -> Any:
    """The small FLUX as a MODEL."""
    sizes, weights = _weights()
    heads, width = sizes["num_attention_heads"], sizes["attention_head_dim"]
    config = {
        "image_model": "flux",
        "in_channels": sizes["in_channels"] // _PATCH**2,
        "out_channels": sizes["in_channels"] // _PATCH**2,
        "vec_in_dim": sizes["pooled_projection_dim"],
        "context_in_dim": sizes["joint_attention_dim"],
        "hidden_size": heads * width,
        "mlp_ratio": 4.0,
        "num_heads": heads,
        "depth": sizes["num_layers"],
        "depth_single_blocks": sizes["num_single_layers"],
        "axes_dim": sizes["axes_dims_rope"],
        "theta": 10000,
        "patch_size": _PATCH,
        "qkv_bias": True,
        "guidance_embed": sizes["guidance_embeds"],
        "txt_ids_dims": [],
    }

    def fill(network: torch.nn.Module, seed: int) -> None:
        # The host's renaming writes into what it is given.
        given = {name: tensor.clone() for name, tensor in weights.items()}
        network.load_state_dict(comfy.model_detection.convert_diffusers_mmdit(given))

    model = model_of(comfy.supported_models.Flux, config, fill_with=fill, **options)
    model.model.latent_format.latent_channels = config["in_channels"]
    return model


@cache
def golden_anystory() -> AnyStory:
    """The small weights, loaded once for all tests."""
    return loaded_anystory()


def loaded_anystory() -> AnyStory:
    """The small weights, converted and loaded."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        convert.convert(publish(Path(folder) / "small.bin"), path)
        return read_anystory(path)


def anystory(model: Any, subjects: Sequence[Subject], **values: Any) -> Any:
    """The AnyStory node on a FLUX, for subjects of the other nodes; `values` are its inputs."""
    form, shown = form_for(model, rank=4), []
    for each in subjects:
        (latents,) = (reference.latents for reference in each.references)
        seed = round(1000 * float(latents.mean())) + 10**6
        tokens, router = (randn(1, n, form.context, seed=seed + n) for n in (9, 4))
        places = -(-latents.shape[-2] // _PATCH) * -(-latents.shape[-1] // _PATCH)
        shown.append(AnyStorySubject(tokens, router, latents, torch.ones(1, places), each.cache))
    return AnyStoryNode.execute(model, random_weights(form), tuple(shown), **values).args[0]


def told(model: Any, settings: AnyStorySettings) -> Any:
    """The model with AnyStory."""
    return add_anystory(model, frozenset(attention_sites(model)), settings)


def guided(model: Any, prompt: list[list[Any]], latents: Tensor, sigmas: Tensor, sampler: Any) -> Tensor:
    """What the host's guider gives from these latents on, without guidance."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt, prompt)
    guider.set_cfg(1.0)
    with torch.inference_mode():
        return guider.sample(latents, torch.zeros_like(latents), sampler, sigmas, disable_pbar=True, seed=0)


def calls_at(sigmas: Tensor, latents: Tensor) -> Any:
    """A sampler that calls the model on the same latents at each noise level."""

    def sampler(model: Any, x: Tensor, given: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        for sigma in sigmas[:-1]:
            model(latents, sigma.expand(len(latents)), **extra_args)
        return x

    return comfy.samplers.KSAMPLER(sampler)
