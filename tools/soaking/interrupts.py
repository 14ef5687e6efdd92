"""Workflows interrupted at every step that one of their nodes tells of."""

from __future__ import annotations

from collections.abc import Mapping

from hosting.client import ApiPrompt
from hosting.errors import WorkflowInterrupted

from .endurance import growth, same
from .served import Soaked, Told
from .workflows import again


def interrupted(served: Soaked, prompts: Mapping[str, ApiPrompt], told: Told) -> list[str]:
    """Runs each workflow whole, then interrupts it at each of its steps: the plain picture after each interrupt, and
    the workflow's own after all of them, are the same as before, and nothing more is held. Gives what was not so."""
    plain, number, faults = served.settled(), 0, []
    for name, prompt in prompts.items():
        for _ in range(2):
            # What a training leaves is there for the second.
            number += 1
            served.interrupt_at(0)
            whole = served.saved(again(prompt, number))
            steps = served.interrupt_at(0)
        served.settled()
        before = served.held()
        for step in range(1, steps + 1):
            number += 1
            served.interrupt_at(step)
            if not _ends(served, again(prompt, number)):
                faults.append(f"{name} was not interrupted at step {step} of {steps}")
            served.interrupt_at(0)
            if served.settled() != plain:
                faults.append(f"the plain picture after {name} was interrupted at step {step} is another")
        faults += [f"{name}, {each}" for each in growth([before, served.held()])]
        number += 1
        if not same(served.saved(again(prompt, number)), whole):
            faults.append(f"{name} gives another picture after it was interrupted")
        told(f"{name}: {steps} interrupts")
    return faults


def _ends(served: Soaked, prompt: ApiPrompt) -> bool:
    try:
        served.saved(prompt)
    except WorkflowInterrupted:
        return True
    return False
