"""What may be said of an ICO training beyond the usual: its words, how they learn, and regularisation pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .checks import check_choice, check_number
from .inputs import ADVANCED
from .training_inputs import CAPTION, rate_input

if TYPE_CHECKING:
    from ..training.concept_words import Scheme
    from ..training.usual import UsualWords

AUTO = "auto"
SUITS = "'auto' is what suits the model."
WORDS_MAX = 32
# The two choices of each input that has some, besides AUTO: what the authors' code does first.
CHOICES = {
    "picture_words_begin": ("as a template", "at random"),
    "concept_words_begin": ("as rare words", "as the noun"),
    "mirrored": ("half the time", "never"),
    "start_token": ("held", "trained"),
}
# The presets' numbers, each with the least that may be given instead.
COUNTS = {"words_before": 0, "words_after": 0, "concept_words": 1}
# What the files call the settings, by their inputs.
TOLD = {
    "noun": "noun",
    "preset": "preset",
    "seed": "seed",
    "batch_size": "batch size",
    "learning_rate": "learning rate",
    "word_learning_rate": "word learning rate",
    "smallest_crop": "smallest crop",
    "image_noise": "image noise",
    "steps": "steps",
    "rank": "rank",
    "words_before": "words before",
    "words_after": "words after",
    "concept_words": "words of the concept",
    "concept_learning_rate": "learning rate of the concept's words",
    "picture_words_begin": "pictures' words begin",
    "concept_words_begin": "concept's words begin",
    "mirrored": "mirrored",
    "start_token": "start token",
}
# What leaves a setting to the model or the preset.
LEFT = {
    **dict.fromkeys(("steps", "batch_size", "learning_rate", "word_learning_rate", "concept_learning_rate"), 0),
    **dict.fromkeys(CHOICES, AUTO),
    **dict.fromkeys(COUNTS, -1),
}


def told(settings: Mapping[str, Any]) -> dict[str, str]:
    """What the files say of some settings, by the inputs' names: a training of the same has the same. What is left to
    the model or the preset is not among it, as long as those have not been asked."""
    return {
        TOLD[name]: value.strip() if isinstance(value, str) else str(value)
        for name, value in settings.items()
        if name in TOLD and (name not in LEFT or value != LEFT[name])
    }


@dataclass(frozen=True)
class Further:
    """The values of the inputs below. Raises ValueError for one that the inputs would not take."""

    words_before: int = -1
    words_after: int = -1
    concept_words: int = -1
    concept_learning_rate: float = 0.0
    picture_words_begin: str = AUTO
    concept_words_begin: str = AUTO
    mirrored: str = AUTO
    start_token: str = AUTO

    def __post_init__(self) -> None:
        check_number("concept_learning_rate", self.concept_learning_rate, 0.0, 1.0)
        for name, least in COUNTS.items():
            value = getattr(self, name)
            if value != -1:
                check_number(name, value, least, WORDS_MAX)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), (AUTO, *choices))

    def settled(self, preset: Scheme, usual: UsualWords) -> Further:
        """These, with what the preset has and what is usual in place of what is left to them."""
        given = {"words_before": preset.before, "words_after": preset.after, "concept_words": preset.concept}
        counts = {name: value for name, value in given.items() if getattr(self, name) == -1}
        first = (usual.template, usual.rare, usual.mirrored, usual.held)
        chosen = {name: pair[not of] for (name, pair), of in zip(CHOICES.items(), first, strict=True)}
        left = {name: value for name, value in chosen.items() if getattr(self, name) == AUTO}
        return replace(self, **counts, **left)

    def scheme(self, preset: Scheme) -> Scheme:
        """The prompt that is learnt, of settled values."""
        return replace(
            preset,
            before=self.words_before,
            after=self.words_after,
            concept=self.concept_words,
            template=self.picture_words_begin == CHOICES["picture_words_begin"][0],
            rare=self.concept_words_begin == CHOICES["concept_words_begin"][0],
        )


def further_inputs() -> list[Any]:
    """The node's last inputs, of which none has to be given."""
    return [
        io.Image.Input(
            "regularisation_images",
            optional=True,
            tooltip="Pictures of other things of the noun, about 10 to 200: half of each step's pictures are these, "
            "so that the noun and other prompts stay what they were. Sample them with this model and the prompt "
            "'a photo of a' and the noun, or take photos.",
        ),
        io.String.Input(
            "regularisation_captions",
            multiline=True,
            default="",
            placeholder=CAPTION,
            **ADVANCED,
            tooltip="What those pictures show, with {} for the noun: one line for all, or one for each. Nothing is "
            f"'{CAPTION}'.",
        ),
        *_count_inputs(),
        rate_input(
            "concept_learning_rate",
            1e-6,
            "Learning rate of the concept's own words: that of the projections for Stable Diffusion. Where it is 0 and "
            "word_learning_rate is not, that.",
            optional=True,
        ),
        _choice(
            "picture_words_begin",
            "As what the pictures' own words begin: 'a photo of a' before and full stops after the concept, as in the "
            "authors' code, or random vectors as spread as the vocabulary.",
        ),
        _choice(
            "concept_words_begin",
            "As what the concept's words begin: words that hardly any caption has, as in the authors' code, or the "
            "noun.",
        ),
        _choice(
            "mirrored",
            "Whether pictures are mirrored half the time, as in the authors' code. Choose 'never' for a concept that "
            "is another one in the mirror: letters, a logo, a parting.",
        ),
        _choice(
            "start_token",
            "Whether the keys and values of the start token, which every prompt has, the empty one too, are held out "
            "of the training, as in the authors' code.",
        ),
    ]


def _count_inputs() -> list[Any]:
    texts = {
        "words_before": "How many words of a picture's own stand before the concept (M).",
        "words_after": "How many words of a picture's own stand after the concept (L).",
        "concept_words": "How many words the concept has (S). More know it better and follow prompts less.",
    }
    return [
        io.Int.Input(
            name,
            default=-1,
            min=-1,
            max=WORDS_MAX,
            **ADVANCED,
            tooltip=f"{text} -1 is the preset's number.",
        )
        for name, text in texts.items()
    ]


def _choice(name: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=[AUTO, *CHOICES[name]],
        default=AUTO,
        **ADVANCED,
        tooltip=f"{tooltip} {SUITS}",
    )
