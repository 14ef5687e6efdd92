"""What became of a case: a picture, a sentence, or a fault."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hosting.base import PACK_FOLDER
from hosting.errors import ServerError, WorkflowError

from .bare import without_patches
from .cases import Case
from .served import Soaked

PICTURE, SENTENCE, REFUSED, HOST, FAULT = "picture", "sentence", "refused by the host", "the host's own error", "FAULT"
# In the frames of a traceback; the folder's name alone also stands in the private host's path.
_OURS = f"custom_nodes{os.sep}{PACK_FOLDER}"
# Longer than any case takes on a slow core.
_SECONDS = 90.0
# How a sentence of the pack's begins and ends.
_SENTENCE = re.compile(r"^[\w'].*\.$")


@dataclass(frozen=True)
class Verdict:
    """One of the words above, and what there is to say of it."""

    what: str
    why: str = ""


def judged(served: Soaked, case: Case, known: dict[str, Any]) -> Verdict:
    """Runs a case and says what became of it."""
    try:
        outputs = served.server.queue(case.prompt, seconds=_SECONDS)
    except WorkflowError as error:
        verdict = failed(error)
    except ServerError as error:
        return Verdict(FAULT, f"a hang, or the server's end: {error}")
    else:
        verdict = _drawn(outputs)
    if verdict.what == FAULT and _fails_alike(served, case, known, verdict):
        return Verdict(HOST, f"also without the pack's patches: {verdict.why}")
    return verdict


def _drawn(outputs: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """What came of a run that nothing stopped."""
    told = [entry for entry in outputs.values() if "digest" in entry]
    if all(entry["finite"][0] for entry in told):
        return Verdict(PICTURE, f"{len(told)} digests")
    return Verdict(FAULT, "a picture with values that are no numbers")


def failed(error: WorkflowError) -> Verdict:
    """What a failed run says of itself."""
    report = error.report
    if "exception_type" not in report:
        return _refused(error)
    kind, message = report["exception_type"], str(report["exception_message"]).strip()
    if not _of_the_pack(report):
        return Verdict(HOST, str(error))
    if kind != "ValueError" or _OURS not in report["traceback"][-1]:
        return Verdict(FAULT, f"{kind}: {message}\n{''.join(report['traceback'][-6:])}")
    if not _SENTENCE.match(message):
        return Verdict(FAULT, f"no sentence: {message}")
    return Verdict(SENTENCE, message)


def _refused(error: WorkflowError) -> Verdict:
    """Of what the host found before anything ran: whether a check of the pack's broke over it."""
    for node in (error.report.get("node_errors") or {}).values():
        for each in node["errors"]:
            extra = each.get("extra_info") or {}
            if _of_the_pack(extra):
                frames = "".join(extra["traceback"][-6:])
                return Verdict(FAULT, f"{extra.get('exception_type')}: {extra.get('exception_message')}\n{frames}")
    return Verdict(REFUSED, str(error))


def _of_the_pack(report: Mapping[str, Any]) -> bool:
    return any(_OURS in frame for frame in report.get("traceback", ()))


def _fails_alike(served: Soaked, case: Case, known: dict[str, Any], verdict: Verdict) -> bool:
    """Whether the host alone comes to such an end over the same workflow, without the patches."""
    bare = without_patches(case.prompt, known)
    if bare == case.prompt:
        return False
    try:
        outputs = served.server.queue(bare, seconds=_SECONDS)
    except WorkflowError as error:
        return verdict.why.startswith(f"{error.report.get('exception_type')}:")
    except ServerError:
        return False
    return _drawn(outputs) == verdict
