"""Routed Reference Attention and Subject Share (AnyStory)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

from comfy_api.latest import io

from ..patches.engine.edit import Edit
from ..patches.engine.engine import add_edit
from ..patches.families import Transformer, attention_sites, chosen_sites, family_of
from ..patches.mechanisms.image_prompt import ReadyPrompt
from ..patches.mechanisms.routed_reference import EmptyTokens, RoutedReference, RoutedReferenceAttention, RoutedTokens
from ..patches.mechanisms.router import MOST_SUBJECTS, Router
from ..patches.mechanisms.subject import Share, Subject
from ..patches.parts.sites import USUAL
from ..patches.parts.window import Window
from .checks import check_choice, check_number, prompt_in
from .image_prompt import at_model, empty_prompt, token_prompt
from .inputs import (
    ADVANCED,
    CURRENT,
    ETA_MAX,
    NEARLY_CLEAN,
    STRENGTH_MAX,
    eta_input,
    level_inputs,
    model_input,
    model_output,
    named_sites_input,
    noise_level_input,
    positions_input,
    reference_conditioning_input,
    seed_input,
    sites_input,
    strength_input,
    subject_input,
    window_inputs,
)
from .references import kept_references, looked_at, positions_for, reference_streams, sites_of_kept
from .types import SEVERAL, RouterType, SubjectType

TOKENS_MAX = 4096
KEPT, SKIPPED = "kept", "skipped"


class SubjectShareNode(io.ComfyNode):
    """Says how much of a subject is shown, and when."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesSubjectShare",
            display_name="Subject Share",
            category=SEVERAL,
            description="For Routed Reference Attention: how strongly one subject is shown, in which part of the "
            "schedule, and with which image prompt.",
            search_aliases=["AnyStory", "subject strength", "image prompt", "gamma"],
            inputs=[
                subject_input(),
                strength_input(),
                *window_inputs(),
                io.Conditioning.Input(
                    "image_prompt",
                    optional=True,
                    tooltip="Tokens that describe the subject, added where it is: an image encoded by a style model, "
                    "an adapter's tokens, or a text of its own. As wide as the model's prompts.",
                ),
                eta_input(),
                io.Int.Input(
                    "last_tokens",
                    default=0,
                    min=0,
                    max=TOKENS_MAX,
                    **ADVANCED,
                    tooltip="How many of the image prompt's tokens count, from its end; 0 is all. Apply Style Model "
                    "puts its tokens (SD 1.x: 8) behind those of a text.",
                ),
            ],
            outputs=[SubjectType.Output(display_name="subject", tooltip="The subject with this share.")],
        )

    @classmethod
    def execute(
        cls,
        subject: tuple[Subject, ...],
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        image_prompt: Any = None,
        eta: float = 1.0,
        last_tokens: int = 0,
    ) -> io.NodeOutput:
        check_number("strength", strength, 0.0, STRENGTH_MAX)
        check_number("last_tokens", last_tokens, 0, TOKENS_MAX)
        check_number("eta", eta, 0.0, ETA_MAX)
        share = Share(
            strength, Window(start_percent, end_percent), token_prompt("image prompt", image_prompt, last_tokens), eta
        )
        # An adapter's prompt stays where no other is given.
        given = [share if share.prompt is not None else replace(share, prompt=each.share.prompt) for each in subject]
        return io.NodeOutput(tuple(replace(each, share=own) for each, own in zip(subject, given, strict=True)))


class RoutedReferenceAttentionNode(io.ComfyNode):
    """Patches a MODEL so that several subjects show, each in its own places."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SubjectPatchesRoutedReferenceAttention",
            display_name="Routed Reference Attention",
            category=SEVERAL,
            description="Shows one to eight subjects in one picture without blending them: each place attends to the "
            "references of its own subject only (AnyStory). Subjects from Encode Subjects show what their trained "
            "encoder made of them.",
            search_aliases=[
                "AnyStory",
                "multi subject",
                "several subjects",
                "several characters",
                "ip adapter",
                "reference attention",
                "regional",
                "consistent",
            ],
            inputs=[
                model_input(),
                SubjectType.Input(
                    "subjects",
                    tooltip="One to eight subjects: chain Subject Reference nodes by their 'others'. Subject Share "
                    "sets one's strength, window and image prompt.",
                ),
                RouterType.Input(
                    "router",
                    tooltip="From Route Subjects by Masks, by Attention or by Encoder: which place belongs to which "
                    "subject.",
                ),
                strength_input(),
                sites_input(
                    "layers see the references and image prompts",
                    "the decoder, which does best without training (the paper trains all); of a transformer all "
                    "layers, no part of which was compared yet; of an encoded subject those that its encoder was "
                    "trained for",
                ),
                *window_inputs(),
                noise_level_input(),
                io.Combo.Input(
                    "cross_attention",
                    options=[KEPT, SKIPPED],
                    default=KEPT,
                    **ADVANCED,
                    tooltip="Whether the pass over a reference has its cross-attention. 'kept': it reads the prompt. "
                    "'skipped' is the paper's, whose ReferenceNet is trained for it.",
                ),
                seed_input(),
                reference_conditioning_input(),
                io.Conditioning.Input(
                    "background_prompt",
                    **ADVANCED,
                    tooltip="Tokens added where no subject is, as an image prompt is where one is. The paper's are "
                    "those of an empty picture.",
                ),
                eta_input(),
                named_sites_input(),
                positions_input(),
                *level_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        subjects: tuple[Subject, ...],
        router: Router,
        strength: float = 1.0,
        sites: str = USUAL,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        noise_level: str = USUAL,
        cross_attention: str = KEPT,
        seed: int = 0,
        reference_conditioning: Any = None,
        background_prompt: Any = None,
        eta: float = 1.0,
        named_sites: str = "",
        positions: str = USUAL,
        fixed_level: float = 0.9,
        refresh_steps: int = 1,
    ) -> io.NodeOutput:
        check_number("strength", strength, 0.0, STRENGTH_MAX)
        check_number("eta", eta, 0.0, ETA_MAX)
        check_choice("cross_attention", cross_attention, (KEPT, SKIPPED))
        window = Window(start_percent, end_percent)
        order = attention_sites(model)
        chosen = {kind: chosen_sites(model, kind, sites, named_sites) for kind in ("self", "cross")}
        if len(subjects) > MOST_SUBJECTS:
            raise ValueError(f"There are {len(subjects)} subjects; one node takes 1 to {MOST_SUBJECTS}.")
        if not subjects:
            return io.NodeOutput(model.clone())
        prompt_in("reference_conditioning", reference_conditioning, model)
        _check_family(model, [s.prompt for s in subjects], background_prompt, cross_attention)
        named = [(subject.prompt, f"The image prompt of subject {n}") for n, subject in enumerate(subjects, 1)]
        prompts = [at_model(prompt, model, name) for prompt, name in named]
        background = at_model(token_prompt("background prompt", background_prompt), model, "The background prompt")
        empty = empty_prompt([subject.prompt for subject in subjects], model)
        # A trained adapter acts in every layer that it was trained for.
        trained = frozenset(site for site in order if site.kind == "cross")
        own_prompted = [trained if isinstance(each, ReadyPrompt) else chosen["cross"] for each in prompts]
        prompted = [layers for layers, prompt in zip(own_prompted, prompts, strict=True) if prompt is not None]
        prompted += [] if background is None else [chosen["cross"]]
        kept = [kept_references(model, subject) for subject in subjects]
        own_sites = [sites_of_kept(each, sites, chosen["self"]) if each else chosen["self"] for each in kept]
        acting = chosen["self"].union(*own_sites, *prompted)
        routing = router.routing(subjects, order, acting, window)
        usual = NEARLY_CLEAN if family_of(model).looks_nearly_clean() else CURRENT
        level = usual if noise_level == USUAL else noise_level
        how = looked_at(level, fixed_level, refresh_steps, without_cross_attention=cross_attention == SKIPPED)
        placed = positions_for(model, positions, placed=True)
        shares: list[Edit] = []
        adapted: list[RoutedTokens] = []
        for number, subject in enumerate(subjects):
            share, own = subject.share, window & subject.share.window
            streams = reference_streams(model, subject, seed, reference_conditioning, how)
            if strength * share.strength and not own.empty:
                weight, here = strength * share.strength, own_sites[number]
                shares.append(RoutedReference(here, own, routing, number, streams, weight, placed, kept[number]))
            prompt = prompts[number]
            if prompt is not None and eta * share.eta and not own.empty:
                tokens = RoutedTokens(own_prompted[number], own, routing, number, prompt, eta * share.eta)
                shares.append(tokens)
                if isinstance(prompt, ReadyPrompt):
                    adapted.append(tokens)
        if background is not None and eta and not window.empty:
            shares.append(RoutedTokens(chosen["cross"], window, routing, len(subjects), background, eta))
        if adapted:
            ground = None if background is not None else len(subjects)
            shares += _of_no_subject(adapted, empty, ground)
        if not shares:
            return io.NodeOutput(model.clone())
        edit = RoutedReferenceAttention(acting, window, routing, tuple(shares))
        return io.NodeOutput(add_edit(model, edit, router.models))


def _of_no_subject(adapted: Sequence[RoutedTokens], empty: ReadyPrompt, ground: int | None) -> list[Edit]:
    """The `empty` picture's tokens beside an adapter's: in the unconditional pass, and in the places of the `ground`
    (its number) unless that has a prompt of its own. As strong as the strongest of them, while any may act."""
    eta, window = max(each.eta for each in adapted), reduce(or_, (each.window for each in adapted))
    sites, routing = adapted[0].sites, adapted[0].routing
    behind = [] if ground is None else [RoutedTokens(sites, window, routing, ground, empty, eta)]
    return [*behind, EmptyTokens(sites, window, empty, eta)]


def _check_family(model: Any, prompts: Sequence[Any], background: Any, cross_attention: str) -> None:
    """Raises ValueError for what a transformer's layers cannot do."""
    family = family_of(model)
    if not isinstance(family, Transformer):
        return
    apart = any(site.kind == "cross" for site in attention_sites(model))
    if not apart and (background is not None or any(prompt is not None for prompt in prompts)):
        raise ValueError(
            f"{family.name} has no layers that read a prompt by themselves, and so none that could read an image "
            "prompt; connect none, and no background prompt."
        )
    if cross_attention == SKIPPED:
        raise ValueError(
            f"cross_attention is '{SKIPPED}', which U-Nets only can do, but this model is {family.name}; set it to "
            f"'{KEPT}'."
        )
