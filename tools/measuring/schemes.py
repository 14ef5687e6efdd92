"""ICO's prompt schemes (DCI, Figure 8): how many words belong to a picture (M + L) and how many to the concept (S),
against a fixed template with as many words of the concept. On the pictures and prompts of `ico`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from .concepts import training_settings, workplace
from .given import Given
from .ico import EMBLEMS, PROMPTS, RATES, STEPS, WORDS, Case, Means, table

if TYPE_CHECKING:
    from subject_patches.training.concept_words import Scheme

# M and L; none is the template.
OWN = ((0, 0), (1, 1), (4, 2))
LENGTHS = (1, 2, 3)


def study(given: Given) -> None:
    """Prints the table, over `given.count` pairs of 8 emblems and 20 prompts each (160 are all)."""
    emblems = min(max(given.count // PROMPTS, 1), EMBLEMS)
    rows = {_name(own, length): (own, length) for length in LENGTHS for own in OWN}
    found: dict[str, list[Means]] = {}
    with workplace(given.toy.clip) as folder:
        for number in range(emblems):
            case = Schemes(given, number, folder, None)
            for name, (own, length) in rows.items():
                means = case.means(WORDS, case.by(_scheme(own, length)))
                found.setdefault(name, []).append(means)
                print(json.dumps({"number": number, "row": name, **asdict(means)}), file=sys.stderr, flush=True)
    print(f"{emblems} emblems, {PROMPTS} prompts each; {STEPS} steps. Paired with the template of as many words:\n")
    table(found, {name: _name(OWN[0], length) for name, (own, length) in rows.items() if own != OWN[0]})


def _name(own: tuple[int, int], length: int) -> str:
    return f"{'template' if own == OWN[0] else f'M {own[0]}, L {own[1]}'}, S {length}"


def _scheme(own: tuple[int, int], length: int) -> Scheme:
    from subject_patches.training.concept_words import SCHEMES

    if own == OWN[0]:
        return replace(SCHEMES["fixed template"], concept=length)
    return replace(SCHEMES["plain"], before=own[0], after=own[1], concept=length)


class Schemes(Case):
    """One emblem, learnt by schemes of any length."""

    def by(self, scheme: Scheme) -> Any:
        """The toy's MODEL with a concept trained so, which is in the prompts from then on."""
        usual = training_settings(self.given.toy, "plain", STEPS, RATES, self.number)
        words = replace(scheme, template=usual.scheme.template, rare=usual.scheme.rare)
        return self.learnt(replace(usual, scheme=words))
