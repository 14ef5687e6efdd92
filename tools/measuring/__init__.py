"""What effects.py and bench.py measure: each mechanism has a `study` of its effect, and `costs`, rows of the table."""

from functools import partial

from . import (
    anystory,
    cut_references,
    dual_branch,
    given_back,
    ico,
    layout,
    learned,
    learned_router,
    oracle,
    recycled_attention,
    referenced_branch,
    references,
    residual_tokens,
    retouch,
    routed_reference,
    schemes,
    semantics,
    together,
)

STUDIES = {
    "recycled attention": recycled_attention.study,
    # Each number by itself, so that several processes can share the work.
    **{f"layout of {things} things": partial(layout.study, things=things) for things in (2, 3, 4)},
    "residual tokens": residual_tokens.study,
    "retouch": retouch.study,
    "dual branch": dual_branch.study,
    **{f"routed references of {count} emblems": partial(routed_reference.study, emblems=count) for count in (2, 3)},
    "ico": ico.study,
    "tuning of AnyLogo": semantics.study,
    "together": together.study,
    "noise level, recycled": references.recycled,
    "noise level, routed": references.routed,
    "strength and layers, routed": partial(references.routed, settings_of=references.STRENGTHS),
    "background, recycled": partial(references.encoded, settings_of=references.BACKGROUNDS),
    "size of references, recycled": partial(references.encoded, settings_of=references.SIZES),
    "routed, unmasked": partial(routed_reference.study, emblems=2, masked=False),
    "cut references": cut_references.study,
    "diversity": cut_references.diversity,
    "oracle": oracle.study,
    "schemes": schemes.study,
    "trained encoder": learned.study,
    **{f"learned routes of {count} emblems": partial(learned_router.routes, emblems=count) for count in (2, 3)},
    **{f"routed by encoder, {count} emblems": partial(learned_router.study, emblems=count) for count in (2, 3)},
}
# Of the second toy, a transformer.
DIT_STUDIES = {
    "recycled attention": partial(
        recycled_attention.study, settings_of=recycled_attention.DIT_SETTINGS, inside="by default, in the region"
    ),
    "size of references, recycled": partial(references.encoded, settings_of=references.SIZES),
    **{
        f"layout of {things} things": partial(layout.study, things=things, settings_of=layout.DIT_SETTINGS)
        for things in (2, 3)
    },
    **{
        f"routed references of {count} emblems": partial(
            routed_reference.study, emblems=count, ways=(*routed_reference.WAYS, routed_reference.UNMOVED)
        )
        for count in (2, 3)
    },
    "dual branch beside a reference": referenced_branch.study,
    "inversion": given_back.study,
}
COSTS = (
    *(recycled_attention.costs, layout.costs, routed_reference.costs, anystory.costs),
    *(learned.costs, learned_router.costs, semantics.costs),
    *(retouch.costs, dual_branch.costs),
)
