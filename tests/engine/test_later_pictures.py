"""What later pictures of a subject cost with the nodes' defaults, by rows of the model, where a cache holds as few of a
run's steps as the default one does of SDXL at 1,024 pixels."""

from __future__ import annotations

from typing import Any

import comfy.supported_models
import pytest
from hosting.random_models import SDXL, SMALL_CONTEXT, model_of
from subject_patches.nodes.subject import SubjectNode
from subject_patches.patches.engine.engine import KEY
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.subject import Subject
from subject_patches.patches.parts.sites import select_sites
from subject_patches.tests.shared.dit_models import dit_model
from subject_patches.tests.shared.models import (
    POOLED,
    counted,
    mask_router,
    recycled,
    reference,
    routed,
    sample,
    small_model,
    subject,
    subject_for,
)

STEPS = 5
# The channels of SDXL's decoder and middle at 1,024 pixels, by blocks: as many places and channels as each has there.
MIDDLE, COARSE, FINE = ("middle", 1024, 1280), ("output", 1024, 1280), ("output", 4096, 640)


@pytest.fixture(scope="module")
def sdxl() -> Any:
    """SDXL in all but its width: as many layers of each kind."""
    config = {**SDXL, "model_channels": 32, "context_dim": SMALL_CONTEXT, "adm_in_channels": POOLED + 6 * 256}
    return model_of(comfy.supported_models.SDXL, config)


def bytes_a_pass(sites: Any) -> int:
    """What one pass over a subject of 1,024 pixels stores in half precision: keys and values."""
    total = 0
    for site in sites:
        _, places, channels = MIDDLE if site.block == "middle" else COARSE if site.number < 3 else FINE
        total += 2 * places * channels * 2
    return total


@pytest.mark.parametrize("mechanism", ["recycled", "sparsely recycled", "routed"])
def test_later_pictures_of_sdxl_cost_what_they_do_without_a_subject(mechanism: str, sdxl: Any) -> None:
    default = next(each.default for each in SubjectNode.GET_SCHEMA().inputs if each.id == "cache_megabytes")
    held = default * 2**20 / bytes_a_pass(select_sites(attention_sites(sdxl), "self", "decoder"))
    assert 7 < held < 8
    rows: list[int] = []
    # One counted model for all: the cache knows it by what patches it.
    model = counted(sdxl, rows)

    def rows_of(patched: Any, steps: int = STEPS, **run: Any) -> int:
        rows.clear()
        sample(patched, steps=steps, size=(4, 4), **run)
        return sum(rows)

    def patched(who: Subject, **values: Any) -> Any:
        if mechanism == "routed":
            return routed(model, (who,), mask_router(1), **values)
        return recycled(model, (who,), keep_probability=0.5 if "sparsely" in mechanism else 1.0, **values)

    roomy = subject(reference(masked=False))
    plain, first, later = rows_of(model), rows_of(patched(roomy)), rows_of(patched(roomy), seed=6)
    assert first == plain + 1
    assert later == plain
    if mechanism == "recycled":
        # The picture's own level at every step, with room for as few of these steps as of SDXL's 30.
        tight = subject(reference(masked=False), megabytes=held / 30 * STEPS * roomy.cache.size / 2**20)
        assert rows_of(patched(tight, noise_level="current")) == plain + STEPS
        assert rows_of(patched(tight, noise_level="current"), seed=6) > plain + STEPS / 2
        assert rows_of(patched(subject(reference(masked=False), megabytes=tight.cache.max_bytes / 2**20))) == plain + 1


def test_what_is_usual(sdxl: Any) -> None:
    """With little noise, one pass in all; of routed references where those of all steps would not fit the cache."""
    for model, recycling, level in ((sdxl, 0.9, 1), (small_model(), 0.9, None), (dit_model("FLUX.1"), 1, 1)):
        one = (subject_for(model),)
        patched = recycled(model, one, noise_level="usual"), routed(model, one, noise_level="usual")
        edits = [each.model_options["transformer_options"][KEY][0] for each in patched]
        assert edits[0].references[0].how.level == recycling
        assert edits[1].shares[0].references[0].how.level == level
