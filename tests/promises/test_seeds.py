"""Promise 7: the same seed gives the same picture, on a re-queue and in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
from subject_patches.tests.shared.mechanisms import Mechanism, fingerprints, over_mechanisms
from subject_patches.tests.shared.models import sample


@over_mechanisms
def test_the_same_seed_gives_the_same_picture(mechanism: Mechanism, model: Any) -> None:
    first = sample(mechanism.on(model), seed=11)
    again = mechanism.on(model)
    sample(again, seed=12)
    assert torch.equal(sample(again, seed=11), first)


def test_also_in_a_fresh_process() -> None:
    script = (
        "import json, pathlib;"
        "from hosting.device import use_cpu_without_gpu;"
        "from hosting.pack import load_pack;"
        "use_cpu_without_gpu(); load_pack(pathlib.Path.cwd());"
        "from subject_patches.tests.shared.mechanisms import fingerprints;"
        "print(json.dumps(fingerprints()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == fingerprints()
