"""Attention sites: which there are, and what a menu choice or a name means."""

from __future__ import annotations

from typing import Any

import pytest
from subject_patches.patches.families import attention_sites, family_of
from subject_patches.patches.parts.sites import CHOICES, LATE, Site, select_sites

SITES = tuple(
    Site(kind, *place)
    for place in (
        ("input", 1, 0), ("input", 3, 0), ("middle", 0, 0),
        ("output", 0, 0), ("output", 1, 0), ("output", 2, 0), ("output", 3, 0),
    )
    for kind in ("self", "cross")
)  # fmt: skip


def names(choice: str, named: str = "", kind: str = "self") -> list[str]:
    return [str(site) for site in sorted(select_sites(SITES, kind, choice, named))]


def test_every_attention_in_the_order_it_runs(model: Any) -> None:
    assert family_of(model).name == "SD 1.x"
    assert attention_sites(model) == SITES


def test_sites_are_where_the_host_looks_for_replacements(model: Any) -> None:
    reached: list[tuple[str, tuple[str, int, int]]] = []
    options: dict[str, Any] = {"patches_replace": {"attn1": {}, "attn2": {}}}

    def noting(slot: str) -> Any:
        def note(query: Any, key: Any, value: Any, extra: dict[str, Any]) -> Any:
            reached.append((slot, (*extra["block"], extra["block_index"])))
            return query

        return note

    for site in SITES:
        slot = "attn1" if site.kind == "self" else "attn2"
        options["patches_replace"][slot][site.key] = noting(slot)
    forward(model, options)
    assert reached == [("attn1" if site.kind == "self" else "attn2", site.key) for site in SITES]


def forward(model: Any, options: dict[str, Any]) -> None:
    import torch
    from subject_patches.tests.shared.models import prompt

    with torch.inference_mode():
        (tokens, _), *_ = prompt(1)
        latents = torch.zeros(1, 4, 8, 8)
        model.model.apply_model(latents, torch.tensor([1.0]), c_crossattn=tokens, transformer_options=options)


def test_menu_choices() -> None:
    assert names("decoder") == ["middle.0.0", "output.0.0", "output.1.0", "output.2.0", "output.3.0"]
    assert names("encoder") == ["input.1.0", "input.3.0"]
    assert sorted(names("encoder and decoder")) == sorted(names("decoder") + names("encoder"))
    assert names("decoder", kind="cross") == names("decoder")
    assert set(CHOICES) == {"usual", "decoder", "encoder", "encoder and decoder", "named"}


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("middle", ["middle.0.0"]),
        ("output", ["output.0.0", "output.1.0", "output.2.0", "output.3.0"]),
        (" input.3 ,output.2.0,, ", ["input.3.0", "output.2.0"]),
        ("output.1, output.1.0", ["output.1.0"]),
    ],
)
def test_names(named: str, found: list[str]) -> None:
    assert names("named", named) == found


@pytest.mark.parametrize("word", ["input.2", "output.0.1", "outpt.3", "output.3.0.0", "output.-1", "middle block"])
def test_names_of_nothing(word: str) -> None:
    with pytest.raises(ValueError, match=r"'.+' names no self-attention of this model; it has input\.1\.0, .*output\."):
        names("named", f"middle, {word}")


def decoder_of(blocks: dict[int, int]) -> list[Site]:
    """A U-Net's sites: its encoder's and middle's, and of the decoder's `blocks` as many as each has."""
    sites = [Site("self", "input", 4, 0), Site("self", "middle", 0, 0)]
    return sites + [Site("self", "output", block, index) for block, depth in blocks.items() for index in range(depth)]


@pytest.mark.parametrize(
    ("blocks", "kept"),
    [
        # SD 1.x and 2.x: MasaCtrl's and DreamMatcher's layers 10 to 15, without those of the coarsest places.
        (dict.fromkeys(range(3, 12), 1), {6, 7, 8, 9, 10, 11}),
        # SDXL, whose blocks have ten layers and two.
        ({0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}, {2, 3, 4, 5}),
        # The small model of the tests.
        (dict.fromkeys(range(4), 1), {1, 2, 3}),
    ],
)
def test_the_later_decoder_is_where_the_swaps_that_the_paper_follows_act(
    blocks: dict[int, int], kept: set[int]
) -> None:
    chosen = select_sites(decoder_of(blocks), "self", LATE)
    assert {(site.block, site.number) for site in chosen} == {("output", block) for block in kept}
    assert len(chosen) == sum(depth for block, depth in blocks.items() if block in kept)
