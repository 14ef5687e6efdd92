"""The Dual-Branch Integration node (DCI)."""

from __future__ import annotations

from functools import partial
from typing import Any

from comfy_api.latest import io

from ..patches.engine.engine import add_edit
from ..patches.families import chosen_sites, family_of
from ..patches.mechanisms.dual_branch import (
    BRANCH_KEY,
    BranchTokens,
    BranchWindow,
    DualBranchIntegration,
    auxiliary_noise,
)
from ..patches.parts.graph import lost
from ..patches.parts.sites import USUAL
from .checks import check_choice, check_number, prompt_in
from .inputs import ADVANCED, SHARE, model_input, model_output, named_sites_input, seed_input, sites_input
from .types import CONCEPT

# Lambda has no limit; a field for numbers needs one, far beyond where the mix stops changing.
INJECTION_MAX = 1000000.0
GAIN_MAX = 100000.0
SHARPNESS_MAX = 1000.0
FIXED, BY_RESOLUTION = "fixed", "by resolution"
SHARED, OWN = "shared", "own"
OWN_NOISE, SAME_NOISE = "own", "the concept's"


class DualBranchIntegrationNode(io.ComfyNode):
    """Patches a MODEL so that an auxiliary branch gives what is not the concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesDualBranchIntegration",
            display_name="Dual-Branch Integration",
            category=CONCEPT,
            description="Makes a model that was tuned on a concept follow the rest of the prompt again: in the first "
            "steps a second branch, with a common noun for the concept, gives everything else (DCI). No training.",
            search_aliases=["DCI", "dual branch", "concept", "overfitting", "editability", "prompt following"],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "concept", tooltip="From Dual-Branch Prompts; the sampler's positive conditioning is the same."
                ),
                io.Conditioning.Input("auxiliary", tooltip="From Dual-Branch Prompts."),
                io.Float.Input(
                    "injection_strength",
                    default=1.0,
                    min=-INJECTION_MAX,
                    max=INJECTION_MAX,
                    step=0.1,
                    tooltip="The paper's lambda, in practice -2 to 2: the more, the more of the picture comes from the "
                    "auxiliary branch. 0 still mixes; use strength to switch off.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the mix is taken. 1 is the paper's, 0 is the unpatched model.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.15,
                    **SHARE,
                    tooltip="For which share of the schedule, from its start, the branches run side by side (T_a). The "
                    "paper's is 0.15, the authors' code has 0.3; 0 is the unpatched model. Only these steps cost more.",
                ),
                io.Combo.Input(
                    "gain_mode",
                    options=[USUAL, FIXED, BY_RESOLUTION],
                    default=USUAL,
                    **ADVANCED,
                    tooltip="'fixed' is the authors', with which the mix depends on the picture's size. 'by "
                    "resolution' mixes at every size as 'fixed' does at 512 x 512. 'usual' is 'fixed' for SD 1.x, "
                    "which it is made for, and 'by resolution' for every other family.",
                ),
                io.Combo.Input(
                    "noise",
                    options=[OWN_NOISE, SAME_NOISE],
                    default=OWN_NOISE,
                    **ADVANCED,
                    tooltip="What the auxiliary branch starts from: a noise of its own, as in the authors' code, or "
                    "the concept's, which lays both pictures out alike.",
                ),
                seed_input(),
                io.Combo.Input(
                    "guidance",
                    options=[SHARED, OWN],
                    default=SHARED,
                    **ADVANCED,
                    tooltip="Whether the auxiliary branch is guided by the generation's negative prediction, or by one "
                    "of its own, which costs another pass in each of these steps.",
                ),
                io.Float.Input(
                    "gain",
                    default=500.0,
                    min=0.0,
                    max=GAIN_MAX,
                    step=10.0,
                    **ADVANCED,
                    tooltip="How hard places switch between the branches. The authors' is 500.",
                ),
                io.Float.Input(
                    "sharpness",
                    default=10.0,
                    min=0.0,
                    max=SHARPNESS_MAX,
                    step=0.5,
                    **ADVANCED,
                    tooltip="How much the attention to words is sharpened, first over the words and then over the "
                    "places. The authors' is 10.",
                ),
                sites_input("cross-attention layers mix the branches", "all, the paper's"),
                named_sites_input(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        concept: Any,
        auxiliary: Any,
        injection_strength: float,
        strength: float,
        end_percent: float,
        gain_mode: str = USUAL,
        noise: str = OWN_NOISE,
        seed: int = 0,
        guidance: str = SHARED,
        gain: float = 500.0,
        sharpness: float = 10.0,
        sites: str = USUAL,
        named_sites: str = "",
    ) -> io.NodeOutput:
        check_number("injection_strength", injection_strength, -INJECTION_MAX, INJECTION_MAX)
        check_number("strength", strength, 0.0, 1.0)
        check_number("gain", gain, 0.0, GAIN_MAX)
        check_number("sharpness", sharpness, 0.0, SHARPNESS_MAX)
        check_choice("gain_mode", gain_mode, (FIXED, BY_RESOLUTION, USUAL))
        check_choice("noise", noise, (OWN_NOISE, SAME_NOISE))
        check_choice("guidance", guidance, (SHARED, OWN))
        prompt_in("concept", concept, model)
        prompt_in("auxiliary", auxiliary or None, model)
        window = BranchWindow(0.0, end_percent)
        chosen = chosen_sites(model, "cross", sites, named_sites, "encoder and decoder")
        if gain_mode == USUAL:
            gain_mode = BY_RESOLUTION if family_of(model).dci_gain_grows() else FIXED
        if strength == 0 or window.empty or not auxiliary:
            return io.NodeOutput(model.clone())
        edit = DualBranchIntegration(
            chosen,
            window,
            _tokens(concept, "concept"),
            _tokens(auxiliary, "auxiliary"),
            auxiliary,
            injection=injection_strength,
            strength=strength,
            gain=gain,
            by_resolution=gain_mode == BY_RESOLUTION,
            cell=model.get_model_object("latent_format").spacial_downscale_ratio,
            sharpness=sharpness,
            own_guidance=guidance == OWN,
            noise=partial(auxiliary_noise, seed=seed) if noise == OWN_NOISE else _same,
        )
        return io.NodeOutput(add_edit(model, edit))


def _tokens(conditioning: Any, name: str) -> BranchTokens:
    found = next((values[BRANCH_KEY] for _, values in conditioning if BRANCH_KEY in values), None)
    if found is not None and found.auxiliary != (name == "auxiliary"):
        other = "auxiliary" if found.auxiliary else "concept"
        raise ValueError(
            f"The {name} input has the {other} conditioning; connect the {name} output of Dual-Branch Prompts."
        )
    if found is None:
        raise ValueError(
            f"The {name} conditioning does not say which of its words are the concept's; connect the {name} output of "
            f"Dual-Branch Prompts.{lost((name,))}"
        )
    return found


def _same(noise: Any) -> Any:
    return noise
