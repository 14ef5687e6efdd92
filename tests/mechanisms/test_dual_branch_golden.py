"""Dual-branch integration against the numbers of DCI's published code: masks, mix, outputs, and its sampler."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.conds import CONDCrossAttn
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_sampling import ModelSamplingDiscrete
from subject_patches.patches.engine.call import AttentionCall, prompt_keys
from subject_patches.patches.engine.chunk import Chunk
from subject_patches.patches.engine.denoising import Denoising
from subject_patches.patches.engine.edit import Start
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.execution import execute
from subject_patches.patches.families import attention_sites
from subject_patches.patches.mechanisms.dual_branch import (
    BRANCH_KEY,
    BranchTokens,
    BranchWindow,
    DualBranchIntegration,
    concept_weight,
    first_open,
    integrate,
    noun_mask,
    others_mask,
    spread,
    token_shares,
)
from subject_patches.patches.parts.prompt import positions_of
from subject_patches.patches.parts.sites import Site
from subject_patches.tests.shared import dense
from subject_patches.tests.shared.golden_cases import Golden, cases_of, folder_of
from subject_patches.tests.shared.models import small_model, through
from torch import Tensor

TOLERANCE, EXACT = 1e-4, 1e-9
SITE = Site("cross", "output", 3, 0)


class Case(Golden):
    """One cross-attention of DCI's code, or its sampler over a stub."""

    def rows(self, group: str) -> slice:
        """The rows of "concept" or of "aux"."""
        start = self.case["row_order"].index(group) * self.case["rows_per_group"]
        return slice(start, start + self.case["rows_per_group"])

    def tokens(self, branch: str) -> BranchTokens:
        """Where the tokens of "custom" or "ldm" are; the case's indices count after the start token, or from the
        prompt's end."""
        length = self.case[f"length_{branch}"]
        noun = sorted(range(1, 1 + length)[index] for index in self.case[f"mask_{branch}"])
        return BranchTokens(((1, 1 + length),), tuple((token, token + 1) for token in noun))

    def projected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        x, context = self.tensors["x"].to(dtype), self.tensors["context"].to(dtype)
        q, k, v = (self.tensors[f"w.to_{name}.weight"].to(dtype) for name in "qkv")
        return x @ q.T, context @ k.T, context @ v.T

    def out(self, attended: Tensor) -> Tensor:
        weight, bias = (self.tensors[f"w.to_out.0.{name}"].to(attended) for name in ("weight", "bias"))
        return attended @ weight.T + bias


CASES = cases_of("dci", Case, lambda each: "length_custom" in each.case)
OPEN = [golden for golden in CASES if golden.case["gate_open"]]
SAMPLERS = cases_of("dci", Case, lambda each: "stub_eps" in each.case and each.case["eta"] == 0)
over_cases = pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden.name)
over_open = pytest.mark.parametrize("golden", OPEN, ids=lambda golden: golden.name)


def per_head(tensor: Tensor, golden: Case) -> Tensor:
    """(rows * heads, ...) to (rows, heads, ...)."""
    return tensor.unflatten(0, (-1, golden.case["heads"]))


@over_open
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.float64, EXACT)])
def test_the_authors_masks_and_mix(golden: Case, dtype: torch.dtype, tolerance: float) -> None:
    query, key, value = golden.projected(dtype)
    heads, spreads, outputs = golden.case["heads"], [], []
    for group, branch, mask in (("concept", "custom", noun_mask), ("aux", "ldm", others_mask)):
        rows, tokens = golden.rows(group), golden.tokens(branch)
        own, noun = positions_of(tokens.prompt), positions_of(tokens.noun)
        attention = dense.shares(query[rows], key[rows], heads).to(dtype)
        shares = token_shares(attention, own)
        total = mask(shares, own, noun)
        spreads.append(spread(total))
        outputs.append(attention @ dense.split(value[rows], heads).to(dtype))
        if dtype == torch.float32:
            for name, made in (("tok", shares), ("mask", total), ("spatial", spreads[-1])):
                name = {"tok": f"tok_{branch}", "mask": f"mask_{branch}_sum", "spatial": f"spatial_{branch}_x500"}[name]
                found = golden.tensors[name]
                torch.testing.assert_close(made, per_head(found, golden), rtol=tolerance, atol=tolerance)
    weight = concept_weight(*spreads, golden.case["lambda"])
    right = golden.tensors["branch_weights" if dtype == torch.float32 else "branch_weights_f64"]
    torch.testing.assert_close(weight, per_head(right[0], golden), rtol=0, atol=tolerance)
    torch.testing.assert_close(1 - weight, per_head(right[1], golden), rtol=0, atol=tolerance)
    mixed = integrate(*outputs, weight).transpose(1, 2).flatten(2)
    # The cases have the mix in float32 only.
    torch.testing.assert_close(mixed.float(), golden.tensors["mixed_before_to_out"], rtol=0, atol=TOLERANCE)
    right = golden.tensors["out" if dtype == torch.float32 else "out_f64"][golden.rows("concept")]
    torch.testing.assert_close(golden.out(mixed), right, rtol=0, atol=tolerance)


def attend(heads: int) -> Callable[..., Tensor]:
    return lambda q, k, v, mask: attention_pytorch(q, k, v, heads, mask)


def begun(edit: DualBranchIntegration, like: Tensor) -> DualBranchIntegration:
    run = edit.begin()
    run.start(Start(like, lambda noise, sigma: noise, torch.zeros_like(like)))
    return run


@over_cases
def test_the_authors_outputs_by_the_edit(golden: Case) -> None:
    query, key, value = golden.projected(torch.float32)
    case, sampling = golden.case, ModelSamplingDiscrete()
    edit = DualBranchIntegration(
        frozenset({SITE}),
        BranchWindow(0.0, case["agg_time"]),
        golden.tokens("custom"),
        golden.tokens("ldm"),
        None,
        injection=case["lambda"],
    )
    run = begun(edit, torch.zeros(1, 4, 8, 8))
    ((branch, sites, parts),) = run.requests(0.0)
    height, width = case["hw"]
    rows = golden.rows("aux")
    plain = [attend(case["heads"])(query, key, value, None)]
    features = {"query": query[rows], "key": key[rows], "value": value[rows], "output": plain[0][rows]}
    features |= {"prompt_key": features["key"], "prompt_output": features["output"]}
    kept = branch.keep(SITE, (height, width), {part: features[part] for part in parts})
    outputs = []
    is_open = edit.window.contains(float(sampling.sigmas[case["time"]]), sampling.percent_to_sigma)
    assert is_open == case["gate_open"]
    assert sites == {SITE}
    for number, group in enumerate(case["row_order"]):
        mine = slice(number * case["rows_per_group"], (number + 1) * case["rows_per_group"])
        entry = {"model_conds": {"c_crossattn": CONDCrossAttn(golden.tensors["context"][mine])}}
        if group == "concept":
            entry[BRANCH_KEY] = golden.tokens("custom")
        chunk = Chunk(mine, group, group == "concept", entry, (8 * height, 8 * width))
        prompt = prompt_keys(SITE, key[mine], chunk)
        call = AttentionCall(query[mine], key[mine], value[mine], case["heads"], SITE, chunk, (height, width), prompt)
        if is_open and run.wants(chunk):
            run.amend(call, 1.0, lambda stream: kept if stream is branch else None)
            (note,) = call.notes
            weights = per_head(golden.tensors["branch_weights"][1], golden).mean(1)
            assert note.name == "aggregation mask"
            torch.testing.assert_close(note.maps()[:, 0].flatten(1), weights, rtol=0, atol=TOLERANCE)
        assert call.amended == (group == "concept" and case["gate_open"])
        outputs += execute([call], attend(case["heads"]))
    found = golden.out(torch.cat(outputs))
    torch.testing.assert_close(found, golden.tensors["out"], rtol=0, atol=TOLERANCE)
    apart = float((found - golden.tensors["out_plain"]).abs().max())
    assert apart > 10 * TOLERANCE if case["gate_open"] else apart < TOLERANCE


@pytest.mark.parametrize("row", json.loads((folder_of("dci") / "gate_table.json").read_text())["table"], ids=str)
def test_the_gate(row: dict[str, Any]) -> None:
    assert first_open(row["agg_time"]) == row["first_open_t"]
    sampling, window = ModelSamplingDiscrete(), BranchWindow(0.0, row["agg_time"])
    is_open = [window.contains(float(sigma), sampling.percent_to_sigma) for sigma in sampling.sigmas]
    assert next((t for t in range(1, 1000) if is_open[t]), None) == row["first_open_t"]
    assert is_open[1:] == sorted(is_open[1:])


def stub(case: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The noise that the case's denoiser predicts, by its latents as DDPM scales them."""
    assert case["stub_eps"] == "0.7*x + 0.9*mean(ctx over tokens,channels) + t/5000 per row"
    return lambda x, context, t: (
        0.7 * x + 0.9 * context.mean((1, 2))[:, None, None, None] + t[:, None, None, None] / 5000
    )


def schedule(golden: Case) -> Tensor:
    """The case's noise levels as the host counts them, falling, with the last step's target."""
    alphas = torch.cat([golden.tensors["ddim_alphas"].flip(0), golden.tensors["ddim_alphas_prev"][:1]])
    return ((1 - alphas) / alphas).sqrt().float()


def as_the_host(x: Tensor, sigma: Tensor) -> Tensor:
    return x * (1 + sigma**2).sqrt()


@pytest.mark.parametrize("golden", SAMPLERS, ids=lambda golden: golden.name)
def test_both_branches_step_by_step_with_the_hosts_euler(golden: Case) -> None:
    """The host's Euler and its guidance, the engine's branch beside it, and the case's denoiser as the model."""
    case, given, sigmas = golden.case, golden.tensors, schedule(golden)
    model = small_model()
    sampling = model.get_model_object("model_sampling")
    torch.testing.assert_close(sampling.sigmas[given["ddim_timesteps"].flip(0)], sigmas[:-1], rtol=1e-4, atol=0)
    epsilon, calls = stub(case), []

    def denoiser(_: Callable[..., Tensor], x: Tensor, sigma: Tensor, c_crossattn: Tensor, **__: Any) -> Tensor:
        context = c_crossattn
        scaled = x / (1 + sigma[:, None, None, None] ** 2).sqrt()
        calls.append((float(sigma[0]), context, scaled))
        return x - sigma[:, None, None, None] * epsilon(scaled, context, sampling.timestep(sigma))

    concept = BranchTokens(((1, 6),), ((2, 4),))

    def start(name: str) -> Tensor:
        # The sampler multiplies its noise by the first level.
        return as_the_host(given[name], sigmas[0]) / sigmas[0]

    edit = DualBranchIntegration(
        frozenset(s for s in attention_sites(model) if s.kind == "cross"),
        BranchWindow(0.0, case["agg_time"]),
        concept,
        BranchTokens(((1, 6),), ((2, 3),)),
        [[given["c_ldm"], {}]],
        own_guidance=not case["share_guidance"],
        noise=lambda noise: start("img_ldm_T"),
    )
    patched = through(add_edit(model, edit), denoiser)
    states: list[Tensor] = []
    with torch.inference_mode():
        last = comfy.sample.sample_custom(
            patched,
            start("x_T"),
            case["cfg_scale"],
            comfy.samplers.sampler_object("euler"),
            sigmas,
            [[given["c"], {BRANCH_KEY: concept}]],
            [[given["uc"], {}]],
            torch.zeros_like(given["x_T"]),
            callback=lambda step, denoised, x, steps: states.append(x.clone()),
            disable_pbar=True,
        )
    last = last * model.model.latent_format.scale_factor
    right = [given["x_T"], *given["x_prev_per_step"]]
    for found, state, sigma in zip([*states, last], right, sigmas, strict=True):
        torch.testing.assert_close(found, as_the_host(state, sigma), rtol=0, atol=1e-4 * float(1 + sigma))
    alone = [(sigma, context, x) for sigma, context, x in calls if len(x) == case["batch"]]
    mine = [(sigma, x) for sigma, context, x in alone if torch.equal(context[:1], given["c_ldm"][:1])]
    assert len(mine) == case["open_steps"]
    right = [given["img_ldm_T"], *given["x_ldm_prev_open_steps"]]
    for (sigma, x), state, level in zip(mine, right, sigmas, strict=False):
        assert sigma == pytest.approx(float(level), rel=1e-5)
        torch.testing.assert_close(x, state, rtol=0, atol=1e-4)


@pytest.mark.parametrize("golden", SAMPLERS, ids=lambda golden: golden.name)
def test_the_branch_of_the_authors_sampler_to_its_last_step(golden: Case) -> None:
    case, given, sigmas = golden.case, golden.tensors, schedule(golden)
    epsilon = stub(case)
    first = as_the_host(given["img_ldm_T"], sigmas[0])
    branch = Denoising(first, lambda sigma: first)
    x, times = given["x_T"], given["ddim_timesteps"].flip(0)
    for number in range(case["open_steps"]):
        sigma, t = float(sigmas[number]), times[number : number + 1]
        state = branch.latents(sigma, lambda *_: torch.full((), torch.nan))
        right = given["img_ldm_T"] if number == 0 else given["x_ldm_prev_open_steps"][number - 1]
        torch.testing.assert_close(state / (1 + sigma**2) ** 0.5, right, rtol=0, atol=1e-4)
        branch.denoised(sigma, state - sigma * epsilon(state / (1 + sigma**2) ** 0.5, given["c_ldm"], t))
        beside = x if case["share_guidance"] else state / (1 + sigma**2) ** 0.5
        latents = as_the_host(beside, sigmas[number])
        branch.guided(sigma, case["cfg_scale"], latents, latents - sigma * epsilon(beside, given["uc"], t))
        x = given["x_prev_per_step"][number]
    last = branch.latents(float(sigmas[case["open_steps"]]), lambda *_: torch.full((), torch.nan))
    right = as_the_host(given["x_ldm_prev_open_steps"][-1], sigmas[case["open_steps"]])
    torch.testing.assert_close(last, right, rtol=0, atol=1e-3)
