"""One training of an ICO concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .concept import ConceptPrompts, Scheme, as_lora, key_value_weights
from .concept_files import Concept
from .copies import loaded, with_gradients
from .denoising import Denoiser
from .loop import Group, Training, compute_dtype
from .residual import filled, shipped_templates
from .state import StateFile
from .text import TextEncoder

# Of the sentences that come with the pack every eighth, some thirty, say what prompts are like.
SENTENCES_STEP = 8


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
    rank: int = 0


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
            sentences = [filled(line, settings.noun) for line in shipped_templates()[::SENTENCES_STEP]]
            spread = prompts.spread(encoder, sentences)
            return Concept(prompts.embedding(), as_lora(before, weights, spread, settings.rank), losses)


def _check_width(prompts: ConceptPrompts, encoder: TextEncoder, denoiser: Denoiser) -> None:
    wanted = denoiser.patcher.model.model_config.unet_config["context_dim"]
    with torch.no_grad():
        found = prompts.encode(encoder, [0])[0].shape[-1]
    if found != wanted:
        raise ValueError(
            f"The CLIP gives contexts {found} wide but this model takes {wanted}; connect the CLIP of the same "
            "checkpoint as the model."
        )
