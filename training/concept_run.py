"""One training of an ICO concept, and the files that it is kept in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor

from .concept import ConceptPrompts, Scheme, as_difference, key_value_weights
from .copies import loaded, with_gradients
from .denoising import Denoiser
from .loop import Group, LossMap, Training, compute_dtype
from .state import StateFile
from .text import TextEncoder

KIND = "ICO concept"


@dataclass(frozen=True)
class Settings:
    """How a concept is trained; the names are those of the node's inputs."""

    noun: str
    scheme: Scheme
    steps: int
    batch_size: int = 2
    learning_rate: float = 1e-5
    word_learning_rate: float = 5e-4
    seed: int = 0
    precision: str = "auto"
    gradient_checkpointing: bool = True


@dataclass(frozen=True)
class Concept:
    """What a training leaves: [T] as an embedding of the host (S, width) for each encoder, the change of the
    projections as its LoRA loaders take it, and the loss of each step."""

    embedding: Mapping[str, Tensor]
    difference: Mapping[str, Tensor]
    losses: LossMap


def train_concept(
    model: Any,
    clip: Any,
    latents: Tensor,
    settings: Settings,
    state: StateFile | None = None,
) -> Concept:
    """Trains a concept on `latents` (pictures, versions of each, channels, h, w), as the VAE gave them. The given model
    and CLIP stay as they are. Raises ValueError when the two are not of one family."""
    with with_gradients():
        latents = latents.clone()
        encoder = TextEncoder(clip)
        dtype = compute_dtype(settings.precision, model.load_device)
        denoiser = Denoiser(model, dtype, settings.gradient_checkpointing)
        with loaded(encoder.patcher, denoiser.patcher):
            source = torch.Generator().manual_seed(settings.seed)
            prompts = ConceptPrompts(encoder, settings.noun, settings.scheme, len(latents), source)
            _check_width(prompts, encoder, denoiser)
            weights = key_value_weights(denoiser.patcher.model.diffusion_model)
            before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
            training = Training(
                [Group(weights, settings.learning_rate), Group(prompts.vectors, settings.word_learning_rate)],
                device=denoiser.device,
                dtype=dtype,
                seed=settings.seed,
                state=state,
            )

            def loss(generator: torch.Generator) -> Tensor:
                numbers = torch.randint(len(latents), (settings.batch_size,), generator=generator)
                versions = torch.randint(latents.shape[1], (settings.batch_size,), generator=generator)
                context, pooled = prompts.encode(encoder, numbers.tolist())
                return denoiser.loss(latents[numbers, versions], context, pooled, generator)

            losses = training.run(settings.steps, loss)
            return Concept(prompts.embedding(), as_difference(before, weights), losses)


def _check_width(prompts: ConceptPrompts, encoder: TextEncoder, denoiser: Denoiser) -> None:
    wanted = denoiser.patcher.model.model_config.unet_config["context_dim"]
    with torch.no_grad():
        found = prompts.encode(encoder, [0])[0].shape[-1]
    if found != wanted:
        raise ValueError(
            f"The CLIP gives contexts {found} wide but this model takes {wanted}; connect the CLIP of the same "
            "checkpoint as the model."
        )


@dataclass(frozen=True)
class ConceptFiles:
    """Where the concept called `name` is kept: one file, embedding and LoRA in one, in the host's own folder for each.

    Raises ValueError when the name is no file's, or a file of that name was not made by this training."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w\-]*", self.name):
            raise ValueError(f"'{self.name}' is no name for a concept; write letters, digits, - and _ only.")
        for path in (self.embedding, self.lora):
            if path.exists() and not _is_ours(path):
                raise ValueError(f"There is already another file {path}; give the concept another name.")

    @property
    def embedding(self) -> Path:
        return Path(folder_paths.get_folder_paths("embeddings")[0]) / f"{self.name}.safetensors"

    @property
    def lora(self) -> Path:
        # Where the host's own trainer saves, and its LoRA loaders look.
        return Path(folder_paths.get_output_directory()) / "loras" / f"{self.name}.safetensors"

    def save(self, concept: Concept, about: Mapping[str, str]) -> None:
        """Writes the file to both places, each whole or not at all."""
        from safetensors.torch import save

        metadata = {"training": KIND, "about": json.dumps(about)}
        tensors = {name: each.contiguous() for name, each in {**concept.difference, **concept.embedding}.items()}
        # Once for both: the order of what a file says of itself differs from one saving to the next.
        whole = save(tensors, metadata)
        for path in (self.lora, self.embedding):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_bytes(whole)
            part.replace(path)


def _is_ours(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("training") == KIND
    except SafetensorError:
        return False
