"""The pack's own link types, menu folders, and how it calls the model families."""

from comfy_api.latest import io

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

# A tuple of patches.mechanisms.subject.Subject.
SubjectType = io.Custom("SUBJECT_PATCHES_SUBJECT")
# One patches.pictures.attention_record.AttentionRuns.
AttentionRecordType = io.Custom("SUBJECT_PATCHES_ATTENTION_RECORD")
# One encoders.ip_adapter.ImagePromptAdapter.
AdapterType = io.Custom("SUBJECT_PATCHES_IMAGE_PROMPT_ADAPTER")
# One encoders.semantic_injection.SemanticMaps.
SemanticsType = io.Custom("SUBJECT_PATCHES_SEMANTICS")
# One encoders.anystory.AnyStory.
AnyStoryType = io.Custom("SUBJECT_PATCHES_ANYSTORY")
# One encoders.subject_encoder.SubjectEncoder.
SubjectEncoderType = io.Custom("SUBJECT_PATCHES_SUBJECT_ENCODER")
# A tuple of patches.anystory.anystory_subject.AnyStorySubject.
AnyStorySubjectType = io.Custom("SUBJECT_PATCHES_ANYSTORY_SUBJECT")
# One patches.mechanisms.router.Router.
RouterType = io.Custom("SUBJECT_PATCHES_ROUTER")
# One patches.mechanisms.layout_regions.Layout.
LayoutType = io.Custom("SUBJECT_PATCHES_LAYOUT")
# One patches.mechanisms.residual.ResidualToken.
ResidualTokenType = io.Custom("SUBJECT_PATCHES_RESIDUAL_TOKEN")
# One patches.mechanisms.inversion.Inversion.
TrajectoryType = io.Custom("SUBJECT_PATCHES_TRAJECTORY")
# One patches.mechanisms.blend_mask.AdaptiveMask.
BlendMaskType = io.Custom("SUBJECT_PATCHES_BLEND_MASK")
