"""The Train ICO Concept node: a concept's words and projections, from a few pictures of it (DCI)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..patches.families import family_of
from ..patches.parts.graph import here
from .checks import check_choice, check_loaded, check_number, single, tell
from .concept_inputs import AUTO, CHOICES, Further, further_inputs, told
from .concept_names import check_name, check_unwritten, files_state
from .inputs import ADVANCED, SHARE
from .training_inputs import (
    batch_input,
    captions_of,
    check_learns,
    check_training,
    checked_noun,
    digest,
    loss_output,
    material_inputs,
    rate_input,
    settled,
    side_input,
    squares,
    steps_input,
    training_inputs,
    training_pictures,
)
from .types import CONCEPT
from .written import refusal, typed

VERSIONS = 8
PRESETS = ("plain", "for dual-branch", "fixed template")
RANK_MAX = 4096


class TrainConceptNode(io.ComfyNode):
    """Trains a concept and saves it for the host's own loaders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesTrainConcept",
            display_name="Train ICO Concept",
            category=CONCEPT,
            description="Teaches a model a concept from a few pictures of it: words for the concept, and the key and "
            "value projections of cross-attention (ICO). The result works in any ComfyUI: an embedding and a LoRA.",
            search_aliases=[
                "ICO",
                "DCI",
                "textual inversion",
                "custom diffusion",
                "lora training",
                "train lora",
                "train character",
                "concept",
                "DreamBooth",
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                *material_inputs(),
                io.String.Input(
                    "name",
                    default="my_concept",
                    tooltip="The files' name: the concept's words are then embedding:my_concept in any prompt, and its "
                    "projections the LoRA my_concept. Files of that name are used again if they are of the same "
                    "training, and replaced if they are of another.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=PRESETS[0],
                    tooltip="The prompt that is learnt for each picture. 'plain': 4 words of its own before the "
                    "concept, 2 after, 2 for the concept. 'for dual-branch', which knows the concept better and "
                    "follows prompts less: 1, 1 and 3. 'fixed template': 'a photo of a', none of its own, 2.",
                ),
                steps_input(
                    "Steps of training. More know the concept better and follow prompts less; 900 are the authors'."
                ),
                side_input(),
                rate_input(
                    "learning_rate",
                    1e-6,
                    "Learning rate of the projections: for Stable Diffusion 0.00001 for each picture of a step.",
                ),
                rate_input(
                    "word_learning_rate",
                    1e-5,
                    "Learning rate of the learnt words: for Stable Diffusion ten times that of the projections for the "
                    "pictures' own, and as much as that for the concept's.",
                ),
                batch_input(),
                io.Float.Input(
                    "smallest_crop",
                    default=0.75,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    **ADVANCED,
                    tooltip="Random parts of the pictures are trained on too, from this share of their side up. 1 is "
                    "the whole picture only.",
                ),
                io.Float.Input(
                    "image_noise",
                    default=0.02,
                    **SHARE,
                    **ADVANCED,
                    tooltip="Noise on those parts (standard deviation, white is 1), so that a picture's grain is not "
                    "learnt.",
                ),
                *training_inputs(),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=RANK_MAX,
                    **ADVANCED,
                    tooltip="Of the LoRA file: how many directions of each projection's change are kept, the best ones "
                    "for prompts. 0 keeps as many as miss no more than a tenth of what it does to prompts; 4096 all.",
                ),
                *further_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The given model with the trained projections."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="The given CLIP. Prompts made with it are encoded after the training, when the embedding "
                    "is there.",
                ),
                io.String.Output(display_name="concept", tooltip="The concept's words: embedding:name and the noun."),
                loss_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, noun: Any = None) -> bool | str:
        return refusal(checked_noun, typed(noun))

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        return files_state(inputs)

    @classmethod
    def execute(
        cls, images: list[Any], regularisation_images: list[Any] | None = None, **given: list[Any]
    ) -> io.NodeOutput:
        values = {name: single(name, values) for name, values in given.items()}
        return cls.trained(images, **values, regularisation_images=regularisation_images or ())

    @classmethod
    def trained(
        cls,
        images: Sequence[Any],
        model: Any,
        clip: Any,
        vae: Any,
        noun: str,
        name: str,
        preset: str,
        steps: int = 0,
        size: int = 0,
        learning_rate: float = 0.0,
        word_learning_rate: float = 0.0,
        batch_size: int = 0,
        smallest_crop: float = 0.75,
        image_noise: float = 0.02,
        seed: int = 0,
        precision: str = "auto",
        gradient_checkpointing: bool = True,
        resume_name: str = "",
        rank: int = 0,
        regularisation_images: Sequence[Any] = (),
        regularisation_captions: str = "",
        words_before: int = -1,
        words_after: int = -1,
        concept_words: int = -1,
        concept_learning_rate: float = 0.0,
        picture_words_begin: str = AUTO,
        concept_words_begin: str = AUTO,
        mirrored: str = AUTO,
        start_token: str = AUTO,
    ) -> io.NodeOutput:
        """`execute`, of the values themselves and sequences of IMAGE batches."""
        import comfy.sd
        import torch

        from ..training.concept_files import KIND, ConceptFiles, size_of
        from ..training.concept_run import Settings, train_concept
        from ..training.concept_words import SCHEMES
        from ..training.copies import told_of
        from ..training.images import varied, version_latents
        from ..training.loop import compute_dtype
        from ..training.regularisation import Regularisation
        from ..training.state import StateFile
        from ..training.usual import Usual, usual_concept, usual_words

        check_loaded(clip, vae)
        check_learns(model, clip)
        check_choice("preset", preset, PRESETS)
        check_training(steps, batch_size, precision, size)
        check_number("learning_rate", learning_rate, 0.0, 1.0)
        check_number("word_learning_rate", word_learning_rate, 0.0, 1.0)
        check_number("smallest_crop", smallest_crop, 0.1, 1.0)
        check_number("image_noise", image_noise, 0.0, 1.0)
        check_number("rank", rank, 0, RANK_MAX)
        words = Further(
            words_before, words_after, concept_words, concept_learning_rate,
            picture_words_begin, concept_words_begin, mirrored, start_token,
        ).settled(SCHEMES[preset], usual_words(model))  # fmt: skip
        noun, files, place = checked_noun(noun), ConceptFiles(name.strip()), here()
        if place is not None:
            check_name(files.name, place)
        usual = usual_concept(model, batch_size, learning_rate)
        # A rate that is given for the words alone is that of all of them.
        concept_rate = words.concept_learning_rate or word_learning_rate
        given = Usual(steps, batch_size, size, learning_rate, word_learning_rate, concept_rate)
        taken = settled(given, usual, "Train ICO Concept")
        words = replace(words, concept_learning_rate=taken.concept)
        pictures = training_pictures(images, taken.side)
        others = squares("regularisation_images", regularisation_images, taken.side)
        captions = captions_of(regularisation_captions, noun, len(others), "regularisation ") if others else []
        about = {
            "family": family_of(model).name,
            **told({"noun": noun, "preset": preset, "seed": seed}),
            **told({"batch_size": taken.batch, "learning_rate": taken.rate, "word_learning_rate": taken.words}),
            **told({"smallest_crop": smallest_crop, "image_noise": image_noise, **vars(words)}),
            "pictures": digest(pictures),
            "precision": str(compute_dtype(precision, model.load_device)),
        }
        if others:
            about |= {"regularisation": digest(others), "captions of that": "; ".join(captions)}
        about |= told_of(model, clip, vae)
        state = None
        if resumed := resume_name.strip():
            state = StateFile(resumed, {"training": KIND, **about})
        about |= told({"steps": taken.steps, "rank": rank})
        concept = files.load(about)
        if concept is None:
            if place is not None:
                check_unwritten(files, place)
            files.check_folders()
            source = torch.Generator().manual_seed(seed)
            versions = [varied(each, VERSIONS, smallest_crop, image_noise, source) for each in pictures]
            twice = words.mirrored == CHOICES["mirrored"][0]
            channels = model.model.latent_format.latent_channels
            latents = version_latents(vae, versions, channels, twice)
            regularisation = None
            if others:
                beside = version_latents(vae, [[each] for each in others], channels, twice)
                regularisation = Regularisation(beside, captions)
            settings = Settings(
                noun, words.scheme(SCHEMES[preset]), taken.steps, taken.batch, taken.rate, taken.words, taken.concept,
                seed, precision, gradient_checkpointing, rank, words.start_token == CHOICES["start_token"][0],
            )  # fmt: skip
            concept = train_concept(model, clip, latents, settings, state, regularisation)
            replaced = files.about()
            files.save(concept, about, place.run if place is not None else "")
            if replaced is not None:
                tell(f"The concept '{files.name}' of another training was replaced.")
            logging.info(
                "The concept '%s' is saved: %s (%.1f MB) and %s (%.1f MB).",
                files.name, files.embedding, size_of(concept.embedding) / 1e6, files.lora,
                size_of(concept.difference) / 1e6,
            )  # fmt: skip
        patched, _ = comfy.sd.load_lora_for_models(model, None, dict(concept.difference), 1.0, 0.0)
        return io.NodeOutput(patched, clip, f"embedding:{files.name} {noun}", concept.losses)
