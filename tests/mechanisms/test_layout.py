"""Layout bias: Cones 2's equations and the authors' numbers."""

from __future__ import annotations

import math
import os

import pytest
import torch
from comfy.conds import CONDCrossAttn
from comfy.ldm.modules.attention import attention_pytorch
from subject_patches.patches.engine.call import AttentionCall, prompt_keys
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.execution import execute
from subject_patches.patches.mechanisms.layout import (
    LayoutBias,
    at_grid,
    eta,
    irrelevant_to,
    logit_deviation,
    region_values,
)
from subject_patches.patches.mechanisms.layout_regions import Layout, Region
from subject_patches.patches.parts.prompt import SPANS_KEY
from subject_patches.patches.parts.sites import Site
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.golden_cases import Golden, cases_of
from subject_patches.tests.shared.layouts import box, resampled
from subject_patches.tests.shared.models import generator

TOLERANCE = 2e-5
SITE = Site("cross", "output", 3, 0)


# The authors' numbers


class Case(Golden):
    """One cross-attention of Cones 2's code."""

    @property
    def grid(self) -> tuple[int, int]:
        """The (height, width) of the layer: given, or a size of the authors' table."""
        if "latent_grid_hw" in self.case:
            return tuple(self.case["latent_grid_hw"])
        width, height = self.case["layout_size_wh"]
        sizes = [(round(height / r), round(width / r)) for r in (8, 16, 32, 64)]
        return next(size for size in sizes if math.prod(size) == self.case["N"])

    @property
    def layout(self) -> Layout:
        size = self.case["layout_size_wh"]
        boxes = self.case["boxes_x0y0x1y1"].items()
        return Layout(*size, tuple(Region(phrase, box(*size, *corners)) for phrase, corners in boxes))

    @property
    def guided(self) -> bool:
        """Unconditional calls get no bias, nor does a context that knows no layout."""
        return not (self.case["uncond_dict"] or self.case["plain_tensor_context"])


# The others are of the authors' sampler, which is another node's.
CASES = cases_of("cones2", Case, lambda each: "w.to_q.weight" in each.tensors)
over_cases = pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
over_guided = pytest.mark.parametrize("golden", [g for g in CASES if g.guided], ids=lambda golden: golden.name)


def golden_call(golden: Case) -> AttentionCall:
    """The case's attention as the engine makes it."""
    case, given = golden.case, golden.tensors
    context = given["context"]
    if case["cross_attention_norm"]:
        weight, bias = given.get("w.norm_cross.weight"), given.get("w.norm_cross.bias")
        context = torch.nn.functional.layer_norm(context, context.shape[-1:], weight, bias)
    spans = {
        phrase: tuple((token, token + 1) for token in places)
        for phrase, places in case["prompt_token_positions"].items()
    }
    entry = {SPANS_KEY: spans, "model_conds": {"c_crossattn": CONDCrossAttn(context)}}
    chunk = Chunk(slice(0, len(context)), "positive", golden.guided, entry, (8 * golden.grid[0], 8 * golden.grid[1]))
    query, key, value = given["x"] @ given["w.to_q.weight"].T, *(context @ given[f"w.to_{n}.weight"].T for n in "kv")
    return AttentionCall(query, key, value, case["heads"], SITE, chunk, golden.grid, prompt_keys(SITE, key, chunk))


def golden_edit(golden: Case) -> LayoutBias:
    """The authors' settings of everything."""
    case = golden.case
    return LayoutBias(
        frozenset({SITE}),
        Window(),
        golden.layout,
        positive=case["positive"],
        negative=case["negative"],
        guidance=case["guidance_weight"],
        each_row=False,
    )


def amended(golden: Case) -> AttentionCall:
    call, edit = golden_call(golden), golden_edit(golden).begin()
    if edit.wants(call.chunk):
        edit.amend(call, golden.case["sigma"], lambda stream: None)
    return call


def test_there_are_cases_of_both_kinds() -> None:
    assert {golden.guided for golden in CASES} == {True, False} or "GOLDEN_DIR" in os.environ
    assert CASES


@over_cases
def test_the_authors_outputs(golden: Case) -> None:
    call = amended(golden)
    assert call.amended == golden.guided
    torch.testing.assert_close(call.probabilities().flatten(0, 1), golden.tensors["attention_probs"], rtol=0, atol=2e-5)
    (output,) = execute([call], lambda q, k, v, mask: attention_pytorch(q, k, v, call.heads, mask))
    output = output @ golden.tensors["w.to_out.0.weight"].T + golden.tensors["w.to_out.0.bias"]
    torch.testing.assert_close(output, golden.tensors["out"], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(output.double(), golden.tensors["out_f64"], rtol=0, atol=TOLERANCE)
    apart = float((output - golden.tensors["out_plain"]).abs().max())
    assert apart > 0.01 if golden.guided else apart < TOLERANCE


@over_guided
def test_the_authors_region_maps_statistic_and_bias(golden: Case) -> None:
    call, case, given = golden_call(golden), golden.case, golden.tensors
    weights = torch.zeros(case["N"], call.key.shape[1])
    for phrase, mask in golden.layout.shown().items():
        values = region_values(mask, irrelevant_to(mask, (), True), case["positive"], case["negative"])
        for token in case["prompt_token_positions"][phrase]:
            weights[:, token] = at_grid(values, golden.grid)
    torch.testing.assert_close(weights, given["w_region"], rtol=TOLERANCE, atol=TOLERANCE)
    deviation = logit_deviation(call.query, call.key, call.heads, each_row=False)
    assert float(deviation) / case["scale"] == pytest.approx(float(given["raw_scores_std"]), abs=TOLERANCE)
    # Hard weights are far too large for an absolute tolerance.
    bias = case["guidance_weight"] * eta(case["sigma"]) * deviation[0] / case["scale"] * weights
    torch.testing.assert_close(bias, given["bias_pre_scale"], rtol=TOLERANCE, atol=TOLERANCE)


# The equations


@pytest.mark.parametrize("each_row", [True, False])
def test_the_deviation_is_that_of_the_whole_matrix(each_row: bool) -> None:
    # Means much larger than what varies around them, as in real models.
    query = torch.randn(3, 60, 24, generator=generator(0)) + 4
    key = torch.randn(3, 11, 24, generator=generator(1)) * torch.tensor([1.0, 3.0, 0.2])[:, None, None] - 5
    logits = dense.logits_of(query, key, 4)
    right = logits.flatten(1).std(1) if each_row else logits.std()[None]
    found = logit_deviation(query, key, 4, each_row)
    assert found.shape == ((3 if each_row else 1), 1, 1)
    torch.testing.assert_close(found.flatten().double(), right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", [(12, 8), (7, 10), (1, 5), (96, 64), (24, 16), (40, 30)])
def test_maps_are_resampled_in_two_dimensions_at_any_size(grid: tuple[int, int]) -> None:
    values = region_values(box(64, 96, 5, 20, 40, 61), box(64, 96, 0, 50, 64, 96), 2.5, -3.0)
    assert set(values.unique().tolist()) == {2.5, -3.0, 0.0}
    torch.testing.assert_close(at_grid(values, grid).double(), resampled(values, grid), rtol=0, atol=1e-4)
