"""The pack's own link types."""

from comfy_api.latest import io

CATEGORY = "Subject Patches"

# A tuple of patches.subject.Subject.
SubjectType = io.Custom("SUBJECT")
# One patches.attention_record.AttentionRecord.
AttentionRecordType = io.Custom("ATTENTION_RECORD")
# One patches.layout_regions.Layout.
LayoutType = io.Custom("LAYOUT")
