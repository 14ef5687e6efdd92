"""The node that encodes a prompt and remembers where its phrases are."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..patches.parts.prompt import SPANS_KEY, find_spans, in_context, split_phrases
from .checks import check_loaded
from .embeddings import embeddings_state
from .inputs import phrases_input, prompt_clip_input, text_input
from .types import SUBJECT, SubjectType
from .written import check_written, refusal


class EncodePromptWithSubjects(io.ComfyNode):
    """The host's text encoding, plus the token spans of each phrase in the conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesEncodePrompt",
            display_name="Encode Prompt with Subjects",
            category=SUBJECT,
            description=(
                "Encodes a prompt as CLIP Text Encode does, and remembers which of its tokens are which phrase, so "
                "that other Subject Patches nodes know where in the prompt a subject is."
            ),
            search_aliases=["subject prompt", "token spans", "clip text encode", "phrase", "prompt", "regional"],
            inputs=[
                prompt_clip_input(),
                text_input(),
                phrases_input(),
                SubjectType.Input(
                    "subjects",
                    optional=True,
                    tooltip="Subjects whose phrases are found as well; subjects without a phrase are passed over.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="The encoded prompt, identical to CLIP Text Encode's, that knows where its phrases are."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None, phrases: str | None = None) -> bool | str:
        return refusal(check_written, text, phrases)

    @classmethod
    def fingerprint_inputs(cls, text: str | None = None, **_inputs: Any) -> Any:
        return embeddings_state(text)

    @classmethod
    def execute(cls, clip: Any, text: str, phrases: str = "", subjects: tuple[Any, ...] | None = None) -> io.NodeOutput:
        check_loaded(clip=clip)
        wanted = (*split_phrases(phrases), *(subject.phrase for subject in subjects or ()))
        spans = find_spans(clip, text, wanted)
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict={SPANS_KEY: spans})
        for tokens, values in conditioning if spans else ():
            placed = {phrase: in_context(clip, text, tokens, found) for phrase, found in spans.items()}
            values[SPANS_KEY] = placed
        return io.NodeOutput(conditioning)
