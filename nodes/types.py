"""The pack's own link types, menu folders, and the inputs that several nodes have."""

from comfy_api.latest import io

from ..patches.sites import CHOICES, USUAL

CATEGORY = "Subject Patches"
# The menu's folders, by what somebody wants to do.
SUBJECT = f"{CATEGORY}/subject"
LAYOUT = f"{CATEGORY}/layout"
SEVERAL = f"{CATEGORY}/several subjects"
CONCEPT = f"{CATEGORY}/concept"
RETOUCH = f"{CATEGORY}/retouch"
INSPECT = f"{CATEGORY}/inspect"
# What tooltips say of the models that a node takes.
FAMILIES = (
    "SD 1.x, SD 2.x, SDXL, SD 3.5, FLUX.1, FLUX.2, Chroma, Qwen-Image, Z-Image, Lumina 2, Krea 2, HiDream, Anima, "
    "Cosmos-Predict2 or Wan"
)

# A tuple of patches.subject.Subject.
SubjectType = io.Custom("SUBJECT_PATCHES_SUBJECT")
# One patches.attention_record.AttentionRuns.
AttentionRecordType = io.Custom("SUBJECT_PATCHES_ATTENTION_RECORD")
# One encoders.ip_adapter.ImagePromptAdapter.
AdapterType = io.Custom("SUBJECT_PATCHES_IMAGE_PROMPT_ADAPTER")
# One encoders.semantic_injection.SemanticMaps.
SemanticsType = io.Custom("SUBJECT_PATCHES_SEMANTICS")
# One encoders.anystory.AnyStory.
AnyStoryType = io.Custom("SUBJECT_PATCHES_ANYSTORY")
# A tuple of patches.anystory_subject.AnyStorySubject.
AnyStorySubjectType = io.Custom("SUBJECT_PATCHES_ANYSTORY_SUBJECT")
# One patches.router.Router.
RouterType = io.Custom("SUBJECT_PATCHES_ROUTER")
# One patches.layout_regions.Layout.
LayoutType = io.Custom("SUBJECT_PATCHES_LAYOUT")
# One patches.residual.ResidualToken.
ResidualTokenType = io.Custom("SUBJECT_PATCHES_RESIDUAL_TOKEN")
# One patches.inversion.Inversion.
TrajectoryType = io.Custom("SUBJECT_PATCHES_TRAJECTORY")
# One patches.blend_mask.AdaptiveMask.
BlendMaskType = io.Custom("SUBJECT_PATCHES_BLEND_MASK")

# What every window's numbers are shares of.
SHARES = (
    "At a lower denoise this is a share of what is left of the schedule; in a run that adds no noise, as the second of "
    "two samplers does, of the whole."
)


def model_input() -> io.Model.Input:
    """The MODEL of a node that patches it."""
    return io.Model.Input("model", tooltip=f"{FAMILIES}. The given model stays as it is.")


def model_output() -> io.Model.Output:
    """The MODEL that such a node gives."""
    return io.Model.Output(display_name="model", tooltip="The patched model, for any sampler.")


def seed_input(tooltip: str) -> io.Int.Input:
    """A seed that stays the same from run to run."""
    bounds = {"default": 0, "min": 0, "max": 2**63 - 1}
    return io.Int.Input("seed", **bounds, control_after_generate=False, tooltip=tooltip, optional=True, advanced=True)


def sites_input(tooltip: str, *more: str) -> io.Combo.Input:
    """Which attention layers a node acts in; `more` are choices of that node alone."""
    options = [USUAL, *more, *CHOICES[1:]]
    return io.Combo.Input("sites", options=options, default=USUAL, tooltip=tooltip, optional=True, advanced=True)


def window_inputs(acts: str) -> list[io.Float.Input]:
    """The window's two inputs; `acts` says what begins in it, as in "the layout begins to act"."""
    bounds = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}
    return [
        io.Float.Input(
            "start_percent",
            **bounds,
            tooltip=f"Where in the run's schedule {acts}, 0 is its first step. {SHARES}",
        ),
        io.Float.Input(
            "end_percent",
            **bounds | {"default": 1.0},
            tooltip=f"Where in the run's schedule it stops; 1 is its last step. Equal to the start: never. {SHARES}",
        ),
    ]


def named_sites_input() -> io.String.Input:
    """Where a user writes blocks when the sites are 'named'."""
    return io.String.Input(
        "named_sites",
        default="",
        optional=True,
        advanced=True,
        tooltip="With sites set to 'named': blocks in the host's words, for example: middle, output.3, "
        "output.4.0; of a transformer: double.3, single.0-12, or block.5.",
    )
