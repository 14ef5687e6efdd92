"""The Dual-Branch Prompts node: both prompts of Dual-Branch Integration (DCI)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from comfy_api.latest import io

from ..patches.mechanisms.auxiliary_prompt import PRESETS, auxiliary_text, counterpart, preset_noun
from ..patches.mechanisms.dual_branch import BRANCH_KEY, BranchTokens
from ..patches.parts.prompt import (
    SPANS_KEY,
    Spans,
    check_embeddings,
    find_spans,
    in_context,
    prompt_spans,
    split_phrases,
)
from ..patches.parts.writing import one_line
from .checks import check_choice, check_loaded
from .embeddings import embeddings_state
from .inputs import ADVANCED, phrases_input, prompt_clip_input, text_input
from .types import CONCEPT
from .written import check_written, refusal

AUTOMATIC = "automatic"


class AuxiliaryPromptNode(io.ComfyNode):
    """Encodes a concept's prompt, and the same with another noun in the concept's place."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesAuxiliaryPrompt",
            display_name="Dual-Branch Prompts",
            category=CONCEPT,
            description="Encodes a prompt with a trained concept in it, and the same prompt with a common noun in the "
            "concept's place, for Dual-Branch Integration (DCI).",
            search_aliases=[
                "DCI",
                "dual branch",
                "auxiliary prompt",
                "auxiliary noun",
                "concept prompt",
                "clip text encode",
            ],
            inputs=[
                prompt_clip_input(),
                text_input(),
                io.String.Input(
                    "concept",
                    default="",
                    placeholder="embedding:my_concept backpack",
                    tooltip="The concept's words and its noun, as they stand in the prompt, for example "
                    "embedding:my_concept backpack. All occurrences are replaced in the auxiliary prompt.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[AUTOMATIC, *PRESETS],
                    default=AUTOMATIC,
                    tooltip="The noun that stands for the concept in the auxiliary prompt. 'automatic' takes the first "
                    "of the list that is not in the prompt.",
                ),
                io.String.Input(
                    "noun",
                    default="",
                    tooltip="An auxiliary noun of your own, instead of a preset. It must differ from the concept's; "
                    "one that is usual in the prompt's scene works best.",
                ),
                phrases_input(**ADVANCED),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="concept",
                    tooltip="The encoded prompt, identical to CLIP Text Encode's: the sampler's positive one, and for "
                    "Dual-Branch Integration.",
                ),
                io.Conditioning.Output(
                    display_name="auxiliary", tooltip="The encoded auxiliary prompt, for Dual-Branch Integration."
                ),
                io.String.Output(display_name="text", tooltip="The auxiliary prompt, to read."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, text: str | None = None, concept: str | None = None, noun: str | None = None, phrases: str | None = None
    ) -> bool | str:
        refused = refusal(_check_concept, text, concept, noun)
        return refused if refused is not True else refusal(check_written, text, phrases)

    @classmethod
    def fingerprint_inputs(cls, text: str | None = None, noun: str | None = "", **_inputs: Any) -> Any:
        return embeddings_state(text, noun)

    @classmethod
    def execute(
        cls, clip: Any, text: str, concept: str, preset: str = AUTOMATIC, noun: str = "", phrases: str = ""
    ) -> io.NodeOutput:
        check_loaded(clip=clip)
        check_choice("preset", preset, (AUTOMATIC, *PRESETS))
        chosen = one_line(noun) or (preset_noun(text) if preset == AUTOMATIC else preset)
        check_embeddings(clip, concept)
        other = auxiliary_text(text, concept, chosen)
        concept = one_line(concept)
        spans = find_spans(clip, text, (concept, *split_phrases(phrases)))
        others = {concept: find_spans(clip, other, (chosen,))[chosen]}
        for phrase in spans.keys() - others.keys():
            # One that has only some of the concept's words has nothing of its own in the auxiliary prompt.
            with suppress(ValueError):
                (others[phrase],) = find_spans(clip, other, (counterpart(phrase, concept, chosen),)).values()
        encoded = [_encode(clip, text, concept, spans), _encode(clip, other, concept, others, auxiliary=True)]
        return io.NodeOutput(*encoded, other)


def _check_concept(text: str, concept: str, noun: str) -> None:
    """Raises ValueError for a concept that the prompt lacks, and for an auxiliary noun of one's own that cannot stand
    for it. Of the presets one that can is looked for when the node runs."""
    auxiliary_text(text, concept, noun.strip() or preset_noun(f"{text} {concept}"))


def _encode(clip: Any, text: str, noun: str, spans: Mapping[str, Spans], auxiliary: bool = False) -> Any:
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    for tokens, values in conditioning:
        placed = {phrase: in_context(clip, text, tokens, found) for phrase, found in spans.items()}
        prompt = in_context(clip, text, tokens, prompt_spans(clip, text))
        values.update({SPANS_KEY: placed, BRANCH_KEY: BranchTokens(prompt, placed[noun], auxiliary)})
    return conditioning
