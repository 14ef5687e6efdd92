"""Inputs and outputs that mean the same in several nodes, each said once.

`tests/nodes/test_inputs.py` holds nodes to it: an input of one name has one type and one tooltip, or a reason why not.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.mechanisms.positions import BESIDE, CENTRED, DAMPED, SAME
from ..patches.parts.sites import CHOICES, USUAL
from .checks import MEGABYTES_MAX
from .types import FAMILIES, SubjectType

CURRENT, FIXED, NEARLY_CLEAN = "current", "fixed", "nearly clean"
REFRESH_MAX = 1000
STRENGTH_MAX = 10.0
ETA_MAX = 10.0
CACHE_MEGABYTES = 2048
# What every window's numbers are shares of.
SHARES = (
    "At a lower denoise this is a share of what is left of the schedule; in a run that adds no noise, as the second of "
    "two samplers does, of the whole."
)
STAYS = "The given model stays as it is."
# An input that is seldom changed: an API workflow may leave it out.
ADVANCED = {"optional": True, "advanced": True}
# The bounds of a number that is a share of something.
SHARE = {"min": 0.0, "max": 1.0, "step": 0.01}


# What a node works with


def model_input(families: str = FAMILIES) -> io.Model.Input:
    """The MODEL of a node that patches it, trains on it or runs it."""
    return io.Model.Input("model", tooltip=f"{families}. {STAYS}")


def model_output() -> io.Model.Output:
    """The MODEL that a node gives which patches it."""
    return io.Model.Output(display_name="model", tooltip="The patched model, for any sampler.")


def vae_input() -> io.Vae.Input:
    """The VAE that encodes pictures."""
    return io.Vae.Input("vae", tooltip="The VAE that belongs to the model.")


def prompt_clip_input() -> io.Clip.Input:
    """The CLIP of a node that encodes prompts."""
    return io.Clip.Input("clip", tooltip="The CLIP that belongs to the model, of any family that this pack knows.")


def text_input() -> io.String.Input:
    """The prompt of a node that encodes one."""
    return io.String.Input(
        "text",
        multiline=True,
        dynamic_prompts=True,
        tooltip="The prompt. Weights like (dog:1.2) and embedding:name work as in CLIP Text Encode.",
    )


def phrases_input(**options: bool) -> io.String.Input:
    """The phrases that a node which encodes a prompt looks for in it."""
    return io.String.Input(
        "phrases",
        multiline=True,
        default="",
        placeholder="one phrase a line",
        tooltip="The phrases to find, one a line or separated by semicolons, written as they stand in the prompt. "
        "Letter case and weights do not matter. dog#2 is the second dog alone. May be empty.",
        **options,
    )


def subject_input() -> io.Custom.Input:
    """The SUBJECT of a node that shows it or gives it something."""
    return SubjectType.Input("subject", tooltip="From Subject Reference: one subject, or several.")


# How it acts


def strength_input(
    tooltip: str = "How much weight the references have in attention: 1 is the paper's, 0 shows none of them, above 1 "
    "pushes harder.",
) -> io.Float.Input:
    """How strongly references act, or what the tooltip says."""
    return io.Float.Input("strength", default=1.0, min=0.0, max=STRENGTH_MAX, step=0.05, tooltip=tooltip)


def eta_input() -> io.Float.Input:
    """How strongly image prompts act."""
    return io.Float.Input(
        "eta",
        default=1.0,
        min=0.0,
        max=ETA_MAX,
        step=0.05,
        tooltip="How strongly image prompts are added (AnyStory's Eq. 5); 0 adds none. A subject's own share and that "
        "of the node are multiplied.",
        **ADVANCED,
    )


def sites_input(acts: str, usual: str, *more: str) -> io.Combo.Input:
    """Which attention layers a node acts in: `acts` says which do what, `usual` what the default is, and `more` are
    choices of that node alone."""
    return io.Combo.Input(
        "sites",
        options=[USUAL, *more, *CHOICES[1:]],
        default=USUAL,
        tooltip=f"Which {acts}. 'usual' is {usual}.",
        **ADVANCED,
    )


def named_sites_input() -> io.String.Input:
    """Where a user writes blocks when the sites are 'named'."""
    return io.String.Input(
        "named_sites",
        default="",
        tooltip="With sites set to 'named': blocks in the host's words, for example: middle, output.3, "
        "output.4.0; of a transformer: double.3, single.0-12, or block.5.",
        **ADVANCED,
    )


def window_inputs() -> list[io.Float.Input]:
    """When a node acts: two shares of the run's schedule."""
    begins = f"Where in the run's schedule this begins to act; 0 is its first step. {SHARES}"
    ends = f"Where in the run's schedule this stops; 1 is its last step. Equal to the start: never. {SHARES}"
    return [
        io.Float.Input("start_percent", default=0.0, tooltip=begins, **SHARE),
        io.Float.Input("end_percent", default=1.0, tooltip=ends, **SHARE),
    ]


def seed_input() -> io.Int.Input:
    """A seed that stays the same from run to run."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**63 - 1,
        control_after_generate=False,
        tooltip="Fixes what this node itself draws by chance; a sampler has its own seed. Where the node shows "
        "references, what is kept of them serves every picture while this one stays.",
        **ADVANCED,
    )


# References


def reference_conditioning_input() -> io.Conditioning.Input:
    """The prompt of the pass over references."""
    return io.Conditioning.Input(
        "reference_conditioning",
        optional=True,
        tooltip="A prompt that describes the reference pictures. Without one, the generation's own positive prompt is "
        "used for them too, as in the paper.",
    )


def noise_level_input() -> io.Combo.Input:
    """At which noise level the model runs on a reference."""
    return io.Combo.Input(
        "noise_level",
        options=[USUAL, CURRENT, FIXED, NEARLY_CLEAN],
        default=USUAL,
        tooltip="At which noise level the model looks at a reference. 'current': the picture's own, one pass a step. "
        "One pass in all: 'nearly clean', the schedule's last, and 'fixed'. 'usual': of transformers 'nearly clean', "
        "of U-Nets 'fixed' at 0.9, for routed subjects 'current' (SDXL: 'nearly clean').",
        **ADVANCED,
    )


def level_inputs() -> list[io.Input]:
    """What goes with the noise level: which one, and how often the model looks."""
    return [
        io.Float.Input(
            "fixed_level",
            default=0.9,
            **SHARE,
            tooltip="With noise_level 'fixed': where in the model's schedule the reference is looked at. 0 is nothing "
            "but noise, 1 is nearly clean.",
            **ADVANCED,
        ),
        io.Int.Input(
            "refresh_steps",
            default=1,
            min=1,
            max=REFRESH_MAX,
            tooltip="With noise_level 'current': how many steps a look at the reference serves. 1 looks at every step; "
            "2 halves what the first picture costs, and what the subject's cache holds.",
            **ADVANCED,
        ),
    ]


def positions_input() -> io.Combo.Input:
    """Where the keys of references stand."""
    return io.Combo.Input(
        "positions",
        options=[USUAL, SAME, CENTRED, BESIDE, DAMPED],
        default=USUAL,
        tooltip="For transformers: where a reference is seen. 'same': from the picture's top left. 'centred': in the "
        "middle of what sees it. 'beside': left of the picture, as AnyStory's on FLUX. 'damped': as 'same', fine "
        "differences count less. 'usual' is 'centred' for routed subjects and region masks, else 'same'.",
        **ADVANCED,
    )


def cache_input(megabytes: int = CACHE_MEGABYTES) -> io.Int.Input:
    """How much a node's output keeps of what models make of it."""
    return io.Int.Input(
        "cache_megabytes",
        default=megabytes,
        min=0,
        max=MEGABYTES_MAX,
        tooltip="How many megabytes of what the model makes of this to keep for the next picture, which then costs "
        "little more than without it. 0 keeps none.",
        **ADVANCED,
    )
