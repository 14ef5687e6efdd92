"""Apply, save and load residual tokens (Cones 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..patches.mechanisms.residual import (
    FORMAT,
    ResidualToken,
    add_residual,
    family_of,
    file_contents,
    in_doubled,
    subject_spans,
)
from ..patches.parts.graph import lost
from ..patches.parts.prompt import SPANS_KEY, positions_of
from .checks import check_number, prompt_in
from .model_files import RESIDUAL_TOKENS
from .saved_files import next_file
from .types import CONCEPT, ResidualTokenType

STRENGTH_MAX = 10.0
# Where families keep words that are not in a prompt's context.
BESIDE_THE_CONTEXT = {"t5xxl_ids": "Anima", "conditioning_llama3": "HiDream"}


class ApplyResidualTokens(io.ComfyNode):
    """Adds a residual to an encoded prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesApplyResidualTokens",
            display_name="Apply Residual Tokens",
            category=CONCEPT,
            description="Turns a noun of the prompt into a learned subject (Cones 2). Chain one node for each subject.",
            search_aliases=["Cones 2", "personalization", "custom subject", "concept", "textual inversion"],
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="From Encode Prompt with Subjects, with the residual's noun among its phrases, or from "
                    "another node of this kind. SD 1.x, SD 2.x or SDXL.",
                ),
                ResidualTokenType.Input("residual", tooltip="From Load Residual Token or Train Residual Token."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-STRENGTH_MAX,
                    max=STRENGTH_MAX,
                    step=0.05,
                    tooltip="How far the noun moves to the subject. 1 is the paper's, 0 leaves the prompt as it is.",
                ),
                io.String.Input(
                    "phrase",
                    default="",
                    tooltip="Which words become the subject: empty for every occurrence of the residual's noun; 'brown "
                    "dog' for the dog of that phrase where the prompt has several; or another name, like 'puppy'. "
                    "It must be among the phrases of Encode Prompt with Subjects, and the noun, too, where the phrase "
                    "has it.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The prompt with the subject in it; still knows its phrases.")],
        )

    @classmethod
    def execute(
        cls, conditioning: list[Any], residual: ResidualToken, strength: float = 1.0, phrase: str = ""
    ) -> io.NodeOutput:
        check_number("strength", strength, -STRENGTH_MAX, STRENGTH_MAX)
        prompt_in("conditioning", conditioning)
        shifted = []
        for context, values in conditioning:
            if context.shape[-1] != residual.width:
                raise ValueError(
                    f"The residual token of '{residual.noun}' is for {family_of(residual.width)} ({residual.width} "
                    f"wide), but the prompt is encoded for {family_of(context.shape[-1])} ({context.shape[-1]} wide); "
                    "take one that was trained with this checkpoint's family."
                )
            for name, family in BESIDE_THE_CONTEXT.items():
                if name in values:
                    raise ValueError(
                        f"Residual tokens are for SD 1.x, SD 2.x and SDXL, but this prompt is encoded for {family}; "
                        "encode it with the CLIP of one of those."
                    )
            try:
                spans = subject_spans(values.get(SPANS_KEY, {}), residual.noun, phrase)
            except ValueError as error:
                raise ValueError(f"{error}{'' if SPANS_KEY in values else lost(('conditioning',))}") from error
            if strength != 0:
                context = add_residual(context, in_doubled(residual.vectors, spans), positions_of(spans), strength)
            shifted.append([context, values.copy()])
        return io.NodeOutput(shifted)


class SaveResidualToken(io.ComfyNode):
    """Writes a residual token to a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesSaveResidualToken",
            display_name="Save Residual Token",
            category=CONCEPT,
            description=f"Saves a residual token, a few kilobytes, into the models folder {RESIDUAL_TOKENS.name}.",
            search_aliases=["Cones 2", "export residual"],
            is_output_node=True,
            inputs=[
                ResidualTokenType.Input("residual", tooltip="From Load Residual Token or Train Residual Token."),
                io.String.Input(
                    "filename_prefix",
                    default="subject",
                    tooltip="The name of the file; a number is added, as for pictures. May name a subfolder.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name, as Load Residual Token has it.")],
        )

    @classmethod
    def execute(cls, residual: ResidualToken, filename_prefix: str) -> io.NodeOutput:
        import folder_paths

        from ..training.files import save_whole

        top = Path(folder_paths.get_folder_paths(RESIDUAL_TOKENS.name)[0])
        file = next_file(filename_prefix, top)
        save_whole(file, *file_contents(residual))
        shown = file.relative_to(top).as_posix()
        return io.NodeOutput(shown, ui={"text": (shown,)})


class LoadResidualToken(io.ComfyNode):
    """Reads a residual token from a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesLoadResidualToken",
            display_name="Load Residual Token",
            category=CONCEPT,
            description=f"Loads a residual token from the models folder {RESIDUAL_TOKENS.name}.",
            search_aliases=["Cones 2", "import residual"],
            inputs=[
                RESIDUAL_TOKENS.file_input(
                    f"A file of the models folder {RESIDUAL_TOKENS.name}, where Save Residual Token puts them."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The CLIP that encodes the prompts. With it, a file for another model family is refused "
                    "here; without, where it is applied.",
                ),
            ],
            outputs=[ResidualTokenType.Output(display_name="residual", tooltip="For Apply Residual Tokens.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, clip: Any = None) -> Any:
        return RESIDUAL_TOKENS.state(file)

    @classmethod
    def execute(cls, file: str, clip: Any = None) -> io.NodeOutput:
        residual = read_residual_token(RESIDUAL_TOKENS.path(file))
        if clip is not None:
            width = clip.encode_from_tokens(clip.tokenize("")).shape[-1]
            if width != residual.width:
                raise ValueError(
                    f"The residual token {file} is for {family_of(residual.width)} ({residual.width} wide), but this "
                    f"CLIP is of {family_of(width)} ({width} wide); choose a file that was trained with this "
                    "checkpoint's family."
                )
        return io.NodeOutput(residual)


def read_residual_token(path: Path) -> ResidualToken:
    """The residual token in a file that Save Residual Token wrote. Raises ValueError when it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError("it was not saved by Save Residual Token")
            vectors = file.get_tensor("residual").float()
            residual = ResidualToken(vectors, about["noun"], int(about["steps"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path.name} is no residual token ({error}); choose another file.") from error
    if vectors.ndim != 2 or not bool(vectors.isfinite().all()):
        raise ValueError(f"{path.name} is no residual token (its vectors are broken); choose another file.")
    return residual
