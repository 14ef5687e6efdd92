"""What every node promises, over every mechanism (the design's section 4, by its numbers)."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from typing import Any

import comfy.model_management
import pytest
import torch
from subject_patches.patches.engine.engine import add_edit
from subject_patches.patches.engine.recording import Recording
from subject_patches.patches.engine.session import Forward, Session
from subject_patches.patches.families import attention_sites
from subject_patches.patches.parts.window import Window
from subject_patches.tests.shared.look import Look
from subject_patches.tests.shared.mechanisms import IDLE, MECHANISMS, Mechanism, fingerprint, over_mechanisms
from subject_patches.tests.shared.models import difference, latent_noise, prompt, sample, small_model, subject
from subject_patches.tests.shared.peers import splitting
from torch import Tensor

# For sums taken in another order, as a share of the largest value: a batch of another size, say.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def plain(model: Any) -> Tensor:
    return sample(model)


def state_of(model: Any) -> tuple[Any, ...]:
    """Everything a node could have left on a MODEL: its options, its patches, its modules' attributes."""

    def tree(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): tree(item) for name, item in value.items()}
        return [tree(item) for item in value] if isinstance(value, (list, tuple)) else (type(value), id(value))

    parts = (model.model_options, model.wrappers, model.callbacks, model.patches, model.object_patches)
    modules = {name: sorted(vars(module)) for name, module in model.model.named_modules()}
    return *(tree(part) for part in parts), str(model.patches_uuid), modules


def left_of_sessions() -> list[Any]:
    gc.collect()
    return [item for item in gc.get_objects() if type(item) in (Session, Recording, Forward)]


# 1


@over_mechanisms
@pytest.mark.parametrize("how", IDLE)
def test_1_nothing_to_do_changes_no_bit(mechanism: Mechanism, how: str, model: Any, plain: Tensor) -> None:
    assert torch.equal(sample(mechanism.off(model, how)), plain)


@over_mechanisms
def test_1_at_work_it_changes_the_picture(mechanism: Mechanism, model: Any, plain: Tensor) -> None:
    assert difference(sample(mechanism.on(model)), plain) > 0.01


@over_mechanisms
def test_1_nothing_is_amended_outside_the_window(mechanism: Mechanism, model: Any) -> None:
    start = 0.3 if mechanism.begins else 0.0
    look = Look(frozenset(attention_sites(model)), Window())
    sample(add_edit(mechanism.patch(model, (subject(),), 1.0, (start, 0.8)), look), steps=8)
    to_sigma = model.model.model_sampling.percent_to_sigma
    inside = {seen.sigma for seen in look.seen if to_sigma(0.8) <= seen.sigma <= to_sigma(start)}
    # Of the layers and steps of a window some may be left out.
    amended = {seen.sigma for seen in look.seen if seen.amended}
    assert len(amended) > 1
    assert amended <= inside < {seen.sigma for seen in look.seen}
    assert {seen.call.chunk.name for seen in look.seen if seen.amended} >= {"positive"}


# 2


@over_mechanisms
def test_2_the_given_model_is_untouched(mechanism: Mechanism, model: Any, plain: Tensor) -> None:
    before = state_of(model)
    patched = mechanism.on(model)
    sample(patched)
    assert state_of(model) == before
    assert torch.equal(sample(model), plain)


@over_mechanisms
def test_2_nothing_of_a_run_survives_it(mechanism: Mechanism, model: Any) -> None:
    patched = mechanism.on(model)
    before = state_of(patched)
    sample(patched)
    assert state_of(patched) == before
    assert left_of_sessions() == []


def interrupt(step: int, *_: Any) -> None:
    if step == 1:
        comfy.model_management.interrupt_current_processing()


def fail(step: int, *_: Any) -> None:
    if step == 1:
        raise RuntimeError("the preview broke")


@over_mechanisms
@pytest.mark.parametrize(
    ("end", "error"),
    [(interrupt, comfy.model_management.InterruptProcessingException), (fail, RuntimeError)],
    ids=["interrupted", "failed"],
)
def test_2_the_run_after_an_ended_one(
    mechanism: Mechanism, end: Callable[..., None], error: type[BaseException], model: Any, plain: Tensor
) -> None:
    patched = mechanism.on(model)
    before = state_of(patched)
    whole = sample(patched, steps=4)
    # A subject of its own: the run that is ended starts with an empty cache, and so may leave half of one.
    ended = mechanism.on(model)
    with pytest.raises(error):
        sample(ended, steps=4, callback=end)
    assert left_of_sessions() == []
    assert state_of(patched) == before
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(ended, steps=4), whole)


def breaking(model: Any, at: int) -> Any:
    """A clone in which the cross-attention that is the `at`-th to run fails, whoever's pass it is of."""
    done = itertools.count(1)

    def fail_once(output: Tensor, _: dict[str, Any]) -> Tensor:
        if next(done) == at:
            raise RuntimeError("out of memory")
        return output

    clone = model.clone()
    clone.set_model_attn2_output_patch(fail_once)
    return clone


@over_mechanisms
@pytest.mark.parametrize("at", [3, 25])
def test_2_the_run_after_a_pass_that_failed(mechanism: Mechanism, at: int, model: Any, plain: Tensor) -> None:
    broken = breaking(mechanism.on(model), at)
    before = state_of(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(broken, steps=4)
    assert left_of_sessions() == []
    assert state_of(broken) == before
    assert torch.equal(sample(model), plain)
    assert torch.equal(sample(broken, steps=4), sample(mechanism.on(model), steps=4))


# 3


@over_mechanisms
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_3_a_batch_is_its_singles(mechanism: Mechanism, size: tuple[int, int], model: Any) -> None:
    patched = mechanism.on(model, size=size)
    together = sample(patched, batch=3, size=size)
    for row in range(3):
        alone = sample(patched, size=size, seed=5 + row)
        assert difference(together[row : row + 1], alone) < ROUNDING


# 4


@over_mechanisms
def test_4_prompts_that_cannot_share_a_batch(mechanism: Mechanism, model: Any) -> None:
    # The host repeats the shorter prompt, which changes nothing, but no more than four times: five times as long, the
    # same prompt takes a pass of its own.
    (tokens, _), *_ = prompt(2)
    apart = [[tokens.repeat(1, 5, 1), {}]]
    patched = mechanism.on(model)
    calls: list[int] = []
    assert difference(sample(counting(patched, calls), batch=2, negative=apart), sample(patched, batch=2)) < ROUNDING
    assert 2 in calls
    assert 4 not in calls


def counting(model: Any, calls: list[int]) -> Any:
    """A clone whose model calls are counted by their rows, through the host's own function wrapper."""

    def wrapped(apply: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        calls.append(len(arguments["input"]))
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    counted = model.clone()
    counted.set_model_unet_function_wrapper(wrapped)
    return counted


@over_mechanisms
def test_4_a_batch_that_another_pack_takes_apart(mechanism: Mechanism, model: Any) -> None:
    patched = mechanism.on(model)
    apart = patched.clone()
    apart.set_model_unet_function_wrapper(splitting)
    assert difference(sample(apart, batch=2), sample(patched, batch=2)) < ROUNDING


# 5


SIZES = ((13, 21), (16, 24), (5, 30), (9, 9))


@pytest.fixture(scope="module")
def plain_at(model: Any) -> dict[tuple[int, int], Tensor]:
    return {size: sample(model, size=size) for size in SIZES}


@over_mechanisms
@pytest.mark.parametrize("size", SIZES)
def test_5_any_width_and_height(
    mechanism: Mechanism, size: tuple[int, int], model: Any, plain_at: dict[tuple[int, int], Tensor]
) -> None:
    result = sample(mechanism.on(model, size=size), size=size)
    assert result.shape == (1, 4, *size)
    assert result.isfinite().all()
    assert difference(result, plain_at[size]) > 0.01
    assert torch.equal(sample(mechanism.off(model, "strength 0"), size=size), plain_at[size])


# 6 is tests/engine/test_samplers.py

# 7


@over_mechanisms
def test_7_the_same_seed_gives_the_same_picture(mechanism: Mechanism, model: Any) -> None:
    first = sample(mechanism.on(model), seed=11)
    again = mechanism.on(model)
    sample(again, seed=12)
    assert torch.equal(sample(again, seed=11), first)


def test_7_also_in_a_fresh_process() -> None:
    script = (
        "import json, pathlib;"
        "from hosting.device import use_cpu_without_gpu;"
        "from hosting.pack import load_pack;"
        "use_cpu_without_gpu(); load_pack(pathlib.Path.cwd());"
        "from subject_patches.tests.shared.mechanisms import MECHANISMS, fingerprint;"
        "print(json.dumps([fingerprint(m) for m in MECHANISMS]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [fingerprint(mechanism) for mechanism in MECHANISMS]


# 8: with other packs it is tests/engine/test_composition.py; recording a run, tests/nodes/test_attention_inspector.py


@pytest.fixture(scope="module")
def alone(model: Any) -> dict[tuple[str, int], Tensor]:
    """What each mechanism samples by itself, with the subject of a seed."""
    return {(m.name, seed): sample(m.on(model, (subject(seed=seed),)), steps=3) for m in MECHANISMS for seed in (1, 2)}


@over_mechanisms
def test_8_two_nodes_stack(mechanism: Mechanism, model: Any, alone: dict[tuple[str, int], Tensor]) -> None:
    """The mechanism with every other one upon it, and itself."""
    first = mechanism.on(model, (subject(seed=1),))
    for above in MECHANISMS:
        # A layout's swap takes the first step to itself, and the last of two has hardly any noise: the second of three.
        result = sample(above.on(first, (subject(seed=2),)), steps=3)
        assert difference(result, alone[mechanism.name, 1]) > 0.003, above.name
        assert difference(result, alone[above.name, 2]) > 0.003, above.name
    assert torch.equal(sample(first, steps=3), alone[mechanism.name, 1])


@over_mechanisms
def test_8_three_of_a_kind_stack(mechanism: Mechanism, model: Any) -> None:
    stacks, results = [model], []
    for seed in (1, 2, 3):
        stacks.append(mechanism.on(stacks[-1], (subject(seed=seed),)))
        results.append(sample(stacks[-1]))
    assert all(difference(one, other) > 0.003 for one, other in itertools.combinations(results, 2))
    assert torch.equal(sample(stacks[2]), results[1])


def test_8_all_nodes_stack(model: Any, alone: dict[tuple[str, int], Tensor]) -> None:
    stacked = reduce(lambda below, mechanism: mechanism.on(below, (subject(seed=1),)), MECHANISMS, model)
    result = sample(stacked)
    assert result.isfinite().all()
    assert all(difference(result, other) > 0.003 for other in alone.values())
    assert torch.equal(sample(stacked), result)


@over_mechanisms
@pytest.mark.parametrize("how", IDLE)
def test_8_an_idle_node_on_top_changes_no_bit(mechanism: Mechanism, how: str, model: Any) -> None:
    patched = mechanism.on(model)
    assert torch.equal(sample(mechanism.off(patched, how)), sample(patched))


# 9: other families are tests/families/test_families.py


PRECISIONS = {
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp16 in fp32": (torch.float16, torch.float32),
    "fp8 in fp32": (torch.float8_e4m3fn, torch.float32),
}


@pytest.fixture(scope="module", params=PRECISIONS)
def rounded_and_exact(request: Any) -> tuple[Any, Tensor, Any, Tensor]:
    """A model of a precision and its picture, and the same weights in float32 and theirs."""
    dtype, compute = PRECISIONS[request.param]
    rounded, exact = small_model(dtype=dtype, compute=compute), small_model()
    exact.model.diffusion_model.load_state_dict(rounded.model.diffusion_model.state_dict())
    return rounded, sample(rounded), exact, sample(exact)


@over_mechanisms
def test_9_precisions(mechanism: Mechanism, rounded_and_exact: tuple[Any, Tensor, Any, Tensor]) -> None:
    rounded, without, exact, exact_without = rounded_and_exact
    result = sample(mechanism.on(rounded))
    assert result.isfinite().all()
    assert difference(result, without) > 0.01
    assert torch.equal(sample(mechanism.off(rounded, "strength 0")), without)
    # What the precision costs must be small beside what the mechanism does.
    right = sample(mechanism.on(exact))
    assert (result - right).abs().mean() < 0.3 * (right - exact_without).abs().mean()


@over_mechanisms
def test_9_offloaded_and_partly_loaded(mechanism: Mechanism) -> None:
    model = small_model()
    patched = mechanism.on(model)
    whole = sample(patched)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(patched), whole)
    patched.partially_unload(patched.offload_device, 2**40)
    assert patched.model.model_lowvram
    assert torch.equal(sample(patched), whole)


# 10 is tests/nodes/test_bad_input.py


def test_the_noise_of_a_row_does_not_depend_on_its_batch() -> None:
    assert torch.equal(latent_noise(3, (7, 10), 5)[2:], latent_noise(1, (7, 10), 7))
