"""The Train ICO Concept node: a concept's words and projections, from a few pictures of it (DCI)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..patches.families import family_of
from .checks import check_choice, check_loaded, check_number
from .training_inputs import (
    batch_input,
    check_learns,
    check_training,
    checked_noun,
    loss_output,
    rate_input,
    settled,
    side_input,
    steps_input,
    training_inputs,
)
from .types import CONCEPT, model_input

VERSIONS = 8
PRESETS = ("plain", "for dual-branch", "fixed template")


class TrainConceptNode(io.ComfyNode):
    """Trains a concept and saves it for the host's own loaders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesTrainConcept",
            display_name="Train ICO Concept",
            category=CONCEPT,
            description="Teaches a model a concept from a few pictures of it: words for the concept, and the key and "
            "value projections of cross-attention (ICO). The result works in any ComfyUI: one file that is an "
            "embedding and a LoRA.",
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
                model_input(),
                io.Clip.Input("clip", tooltip="The CLIP of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input(
                    "images",
                    tooltip="Pictures of the concept, about 3 to 6: from Batch Images, or the list of Load Image (from "
                    "Folder). Their middle squares are taken.",
                ),
                io.String.Input("noun", default="", tooltip="What the concept is, in a word: backpack, dog, emblem."),
                io.String.Input(
                    "name",
                    default="my_concept",
                    tooltip="The file's name: the concept's words are then embedding:my_concept in any prompt, and its "
                    "projections the LoRA my_concept. A file of that name that this node made is replaced.",
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
                    "Steps of training. More know the concept better and follow prompts less; 500 is the paper's."
                ),
                side_input("size"),
                rate_input("learning_rate", 1e-6, "Learning rate of the projections: 0.00001 for Stable Diffusion."),
                rate_input(
                    "word_learning_rate", 1e-5, "Learning rate of the learnt words: 0.0005 for Stable Diffusion."
                ),
                batch_input("Pictures in each step."),
                io.Float.Input(
                    "smallest_crop",
                    default=0.75,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Random parts of the pictures are trained on too, from this share of their side up. 1 is "
                    "the whole picture only.",
                ),
                io.Float.Input(
                    "image_noise",
                    default=0.02,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Noise on those parts (standard deviation, white is 1), so that a picture's grain is not "
                    "learnt.",
                ),
                *training_inputs(),
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
    def execute(cls, images: list[Any], **given: list[Any]) -> io.NodeOutput:
        return cls.trained(images, **{name: values[0] for name, values in given.items()})

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
    ) -> io.NodeOutput:
        """`execute`, of the values themselves and a sequence of IMAGE batches."""
        import comfy.sd
        import torch

        from ..training.concept import SCHEMES, varied
        from ..training.concept_run import KIND, ConceptFiles, Settings, train_concept
        from ..training.copies import fingerprint
        from ..training.images import latents_of, pictures_of, square
        from ..training.loop import compute_dtype
        from ..training.state import StateFile
        from ..training.usual import Usual, usual_concept

        check_loaded(clip, vae)
        check_learns(model, clip)
        check_choice("preset", preset, PRESETS)
        check_training(steps, batch_size, precision, size=size)
        check_number("learning rate", learning_rate, 0.0, 1.0)
        check_number("word learning rate", word_learning_rate, 0.0, 1.0)
        check_number("smallest crop", smallest_crop, 0.0, 1.0)
        check_number("image noise", image_noise, 0.0, 1.0)
        noun = checked_noun(noun)
        family, files = family_of(model).name, ConceptFiles(name.strip())
        usual = usual_concept(model)
        taken = settled(Usual(steps, batch_size, size, learning_rate, word_learning_rate), usual, "Train ICO Concept")
        pictures = [square(picture, taken.side) for picture in pictures_of(images)]
        if not pictures:
            raise ValueError("There are no training pictures; give about 3 to 6 of the concept.")
        digest = hashlib.sha256(torch.cat(pictures).cpu().numpy().tobytes()).hexdigest()[:16]
        about = {
            "family": family,
            "noun": noun,
            "preset": preset,
            "pictures": digest,
            "batch size": str(taken.batch),
            "learning rate": str(taken.rate),
            "word learning rate": str(taken.words),
            "smallest crop": str(smallest_crop),
            "image noise": str(image_noise),
            "precision": str(compute_dtype(precision, model.load_device)),
            "seed": str(seed),
        }
        state = None
        if resumed := resume_name.strip():
            trained = {"model and CLIP": fingerprint(model, clip.patcher)}
            state = StateFile(resumed, {"training": KIND, **about, **trained})
        source = torch.Generator().manual_seed(seed)
        versions = [varied(each, VERSIONS, smallest_crop, image_noise, source) for each in pictures]
        latents = torch.stack([latents_of(vae, each) for each in versions])
        settings = Settings(
            noun,
            SCHEMES[preset],
            taken.steps,
            taken.batch,
            taken.rate,
            taken.words,
            seed,
            precision,
            gradient_checkpointing,
        )
        concept = train_concept(model, clip, latents, settings, state)
        files.save(concept, about)
        patched, _ = comfy.sd.load_lora_for_models(model, None, dict(concept.difference), 1.0, 0.0)
        return io.NodeOutput(patched, clip, f"embedding:{files.name} {noun}", concept.losses)
