"""A small sample of what `tools/soak.py` asks at length, and that it would tell what it looks for."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from host import Host, Server
from hosting.base import PACK_FOLDER
from hosting.client import ApiPrompt
from hosting.errors import ServerError, WorkflowError
from soaking.bare import without_patches
from soaking.cases import Case, case_of
from soaking.described import PACK
from soaking.endurance import endured, growth, together
from soaking.flags import flagged, twice
from soaking.fuzz import fuzz, report
from soaking.homes import HOMES
from soaking.interrupts import interrupted
from soaking.served import Held, Soaked
from soaking.starts import brought
from soaking.verdicts import FAULT, HOST, PICTURE, REFUSED, SENTENCE, failed, judged
from soaking.workflows import small_workflows

from ..shared.small_server import add_files

# A patch, a swap with its inversions, a layout and a router.
NAMES = ["emblem_in_a_scene", "retouch_a_picture", "two_emblems_by_masks"]
HELD = Held(resident=1, tensors=10, bytes=100, hooks=1, runs=0, threads=3, models=1)


@pytest.fixture(scope="module")
def served(flux_server: Server) -> Soaked:
    """A server with small files of every kind."""
    add_files(flux_server.base)
    return Soaked(flux_server)


def test_cases_end_in_a_picture_or_a_sentence(served: Soaked) -> None:
    """Many of the pack's nodes, and some chains of them."""
    tally = fuzz(served, range(0, 40, 2))
    assert tally.faults == [], report(tally)
    assert len(tally.nodes) > 15
    assert tally.verdicts[PICTURE] > 2
    assert tally.verdicts[SENTENCE] > 2


def test_a_case_is_its_numbers(served: Soaked) -> None:
    """And its patches can be taken out of it."""
    known = served.server.object_info()
    first, again, other = (case_of(seed, 3, known) for seed in (0, 0, 1))
    assert first == again
    assert first.prompt != other.prompt
    assert any(kind.startswith(PACK) for kind in _behind_the_sampler(first.prompt))
    bare = _behind_the_sampler(without_patches(first.prompt, known))
    assert bare
    assert not any(kind.startswith(PACK) for kind in bare)


def _behind_the_sampler(prompt: ApiPrompt) -> list[str]:
    """The kinds of nodes that the MODEL of the last one comes through."""
    node = [node for node in prompt.values() if node["class_type"] == "KSampler"][-1]
    kinds = []
    while isinstance(node["inputs"].get("model"), list):
        node = prompt[node["inputs"]["model"][0]]
        kinds.append(node["class_type"])
    return kinds


@pytest.mark.parametrize(
    ("kind", "message", "last", "what"),
    [
        ("ValueError", "The size is 0; give a number from 64 to 2048.", True, SENTENCE),
        ("ValueError", "'dog' is no phrase; write one.", True, SENTENCE),
        ("ValueError", "too many values to unpack (expected 2)", True, FAULT),
        ("ValueError", "(2, 3) is no shape.", True, FAULT),
        ("ValueError", "The axes of attn_mask do not match.", False, FAULT),
        ("TypeError", "The size is a str.", True, FAULT),
    ],
)
def test_what_a_failed_run_says_of_itself(kind: str, message: str, last: bool, what: str) -> None:
    """A sentence is the pack's own; an error that only passes through the pack is a fault, of which the last frames are
    told, one beside it is none, also in a folder that is called as the pack's is."""
    ours, host = (
        f'File "{os.sep.join((PACK_FOLDER, *parts))}", line 1' for parts in (("custom_nodes", PACK_FOLDER), ("x",))
    )
    told = {
        "exception_type": kind,
        "exception_message": f"{message}\n",
        "traceback": [*["first"] * 6, host, ours, *[host] * (not last)],
    }
    verdict = failed(WorkflowError("", report=told))
    assert verdict.what == what
    if what == SENTENCE:
        assert verdict.why == message
    if what == FAULT and not verdict.why.startswith("no sentence: "):
        assert verdict.why.endswith("".join(told["traceback"][-6:]))
    assert failed(WorkflowError("", report={**told, "traceback": [host]})).what == HOST


def test_what_a_refused_run_says_of_itself() -> None:
    frames = [f'File "base{os.sep}custom_nodes{os.sep}{PACK_FOLDER}{os.sep}x.py", line 1']
    for told, what in (({"traceback": frames}, FAULT), ({"traceback": []}, REFUSED), ({}, REFUSED), (None, REFUSED)):
        error = {"extra_info": told}
        assert failed(WorkflowError("", report={"node_errors": {"1": {"errors": [error]}}})).what == what
    for nothing in ({}, {"node_errors": None}):
        assert failed(WorkflowError("", report={"error": "no outputs", **nothing})).what == REFUSED


DRAWN, BROKEN = ({"3": {"digest": ["a"], "finite": [finite]}} for finite in (True, False))
TWO, HANGS = {**DRAWN, "4": BROKEN["3"]}, ServerError()


def ended(kind: str) -> WorkflowError:
    """A run that the host ended with an error, over what the pack gave it."""
    frames = [f'File "base{os.sep}custom_nodes{os.sep}{PACK_FOLDER}{os.sep}x.py", line 1', 'File "base/x.py", line 1']
    return WorkflowError("", report={"exception_type": kind, "exception_message": "no", "traceback": frames})


@pytest.mark.parametrize(
    ("patched", "bare", "what"),
    [
        (DRAWN, None, PICTURE),
        (BROKEN, DRAWN, FAULT),
        (TWO, DRAWN, FAULT),
        (BROKEN, BROKEN, HOST),
        (ended("TypeError"), ended("TypeError"), HOST),
        (ended("TypeError"), ended("KeyError"), FAULT),
        (ended("TypeErrors"), ended("TypeError"), FAULT),
        (ended("TypeError"), DRAWN, FAULT),
        (ended("TypeError"), BROKEN, FAULT),
        (ended("TypeError"), HANGS, FAULT),
        (HANGS, None, FAULT),
    ],
)
def test_what_became_of_a_case(patched: Any, bare: Any, what: str) -> None:
    """A fault is the host's own where the same workflow without the patches ends so, too; None is asked for nothing."""
    answers, asked = [each for each in (patched, bare) if each is not None], []

    def queue(prompt: ApiPrompt, seconds: float) -> Any:
        asked.append(prompt)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def case(link: str) -> Case:
        nodes = (("Loader", {}), (f"{PACK}Patch", {"model": ["1", 0]}), ("Sampler", {"model": [link, 0]}))
        prompt = {f"{n}": {"class_type": kind, "inputs": inputs} for n, (kind, inputs) in enumerate(nodes, 1)}
        return Case(1, "toy", (), prompt, ())

    known = {kind: {"output": ["MODEL"]} for kind in ("Loader", f"{PACK}Patch", "Sampler")}
    served = Soaked(SimpleNamespace(queue=queue))
    assert judged(served, case("2"), known).what == what
    assert answers == []
    assert asked == [case("2").prompt, without_patches(case("2").prompt, known)][: len(asked)]
    if what == HOST:
        # A workflow that has no patch in its way is asked once.
        answers.append(patched)
        assert judged(served, case("1"), known).what == FAULT


@pytest.mark.parametrize(("next_one", "told"), [("other", "is another"), (ServerError("gone"), "did not come (gone)")])
def test_what_became_of_the_next_plain_picture_is_told(served: Soaked, next_one: Any, told: str) -> None:
    plain = [*["usual"] * len(HOMES), next_one]

    def picture(*_home: Any) -> str:
        if isinstance(plain[0], ServerError):
            raise plain[0]
        return plain.pop(0)

    known = served.server.object_info()
    server = SimpleNamespace(get=lambda path: known, queue=lambda prompt, seconds: DRAWN)
    stand_in: Any = SimpleNamespace(server=server, plain=picture, kept_files=dict, held=lambda: HELD)
    ((case, verdict),) = fuzz(stand_in, [1]).faults
    assert verdict.why.startswith(f"the next plain picture of {case.home} {told}; ")


def test_workflows_in_turn_leave_nothing(served: Soaked) -> None:
    result = endured(served, small_workflows(served.server, NAMES), 2 * len(NAMES), lambda _: None)
    assert result.faults == []
    assert len(result.held) == 2


def test_what_grows_is_told() -> None:
    assert growth([HELD, replace(HELD, resident=2, threads=4)]) == []
    assert growth([HELD, replace(HELD, hooks=2)]) == ["hooks: 1 after the first round, 2 after the last"]


def test_what_is_another_each_time_is_told() -> None:
    """By every subject, of a server on which nothing stays as it was."""
    number = count(1)
    served: Any = SimpleNamespace(
        settled=lambda: str(next(number)),
        saved=lambda prompt: {"1": str(next(number))},
        held=lambda: replace(HELD, hooks=next(number)),
        resident=lambda: 1,
        kept_files=lambda: {f"file {next(number)}": 1},
        interrupt_at=lambda step: 1,
    )
    for faults, words in (
        (
            endured(served, {"a": {}}, 2, lambda _: None).faults,
            ("picture after run 1", "another picture in run 2", "picture after run 2", "left or changed", "hooks: "),
        ),
        (together(served, {"a": {}}, lambda _: None), ("of client 1 is another", "of client 2 is another")),
        (
            interrupted(served, {"a": {}}, lambda _: None),
            ("not interrupted at step 1", "plain picture after a", "hooks: ", "gives another picture"),
        ),
    ):
        assert len(faults) == len(words), faults
        assert all(each in fault for each, fault in zip(words, faults, strict=True)), faults


def test_interrupts_leave_nothing(served: Soaked) -> None:
    told: list[str] = []
    assert interrupted(served, small_workflows(served.server, NAMES[1:2]), told.append) == []
    (line,) = told
    assert int(line.split(": ")[1].split()[0]) > 3


def test_two_clients_at_once(served: Soaked) -> None:
    told: list[str] = []
    assert together(served, small_workflows(served.server, NAMES), told.append) == []
    assert sorted(told) == [f"client {number} has its {len(NAMES)} pictures" for number in (1, 2)]


def test_a_host_without_a_cache(host: Host, served: Soaked) -> None:
    told: list[str] = []
    usual, faults = twice(served, small_workflows(served.server, NAMES[:1]))
    assert faults == []
    assert flagged(host, [("--cache-none",)], usual, NAMES[:1], told.append) == []
    assert told == [f"--cache-none: {len(usual)} pictures, at most 0.000 of 255 from the usual on average"]


def test_the_hosts_start_imports_nothing_for_the_pack(host: Host) -> None:
    """But its own modules: how long they take, `tools/soak.py start` measures."""
    assert brought(host) == []
