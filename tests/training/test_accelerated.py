"""The steps of a training by command, on a line through a few points: what is drawn, summed, averaged, saved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from subject_patches.training.accelerated import STATE, Accelerated, Kind, Plan
from subject_patches.training.samples import Folder, Raw
from torch import Tensor, nn


class Line(Kind):
    """A weight whose loss has the gradient `slope` everywhere, beside one that nothing reaches. `told` are the loss's
    numbers in turn, `seen` the samples and seeds of each."""

    name = "line"

    def __init__(self, slope: float = 0.5, told: Sequence[float] = (), settings: dict[str, Any] | None = None) -> None:
        self.slope, self.told, self.settings = slope, list(told), settings or {}
        self.frozen: Any = SimpleNamespace(device=torch.device("cpu"), patchers=(), fingerprints={"checkpoint": "a"})
        self.modules = nn.ParameterDict({"used": torch.tensor([1.0]), "unused": torch.tensor([1.0])})
        self.seen: list[tuple[list[str], int]] = []

    def decode(self, raw: Raw, size: int, key: str) -> str:
        return Path(key).name

    def loss(self, samples: Sequence[str], generator: torch.Generator) -> Tensor:
        self.seen.append((list(samples), generator.initial_seed()))
        used = self.modules["used"].sum()
        number = self.told.pop(0) if self.told else 2.0
        return number + self.slope * (used - used.detach())

    def write(self, modules: Any, folder: Path) -> tuple[Path, ...]:
        save_file(dict(modules.state_dict()), folder / "line.safetensors")
        return (folder / "line.safetensors",)


def process(rank: int = 0, count: int = 1, others: float = 0.0) -> Any:
    """One of some processes, of which all others have gradients and losses of so much."""
    return SimpleNamespace(
        process_index=rank, num_processes=count, is_main_process=rank == 0, autocast=nullcontext,
        backward=lambda loss: loss.backward(), wait_for_everyone=lambda: None,
        reduce=lambda flat, how: {"mean": (flat + others * (count - 1)) / count}[how],
    )  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Folder:
    for number in range(6):
        (tmp_path / f"{number}.picture.png").touch()
    return Folder(tmp_path)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tmp_path / "out", 3, 1, 64, 0.1, accumulation=2, average=0.5)


def test_what_is_seen_and_drawn_depends_on_step_and_rank(source: Folder, plan: Plan) -> None:
    """Another in each part of each step of each process; one that goes on has the rest of what it would have had, and
    ends where it would have ended."""
    seen = {}
    for rank in (0, 1):
        kind = Line()
        Accelerated(kind, source, replace(plan, folder=plan.folder / str(rank)), process(rank, 2)).run()
        seen[rank] = kind.seen
    assert len({seed for each in seen.values() for _, seed in each}) == 12
    assert {name for each in seen.values() for names, _ in each[:3] for name in names} == {str(n) for n in range(6)}
    parts = []
    for steps in (1, 3):
        kind = Line()
        Accelerated(kind, source, replace(plan, steps=steps), process(0, 2)).run()
        parts += kind.seen
    assert parts == seen[0]
    whole, later = (torch.load(folder / STATE, weights_only=True) for folder in (plan.folder / "0", plan.folder))
    for state in (whole, later):
        state["moments"] = state.pop("optimiser")["state"]
    for part in ("modules", "average", "moments"):
        torch.testing.assert_close(whole[part], later[part], rtol=0, atol=0)
    other = Line()
    Accelerated(other, source, replace(plan, folder=plan.folder / "other", seed=1), process(0, 2)).run()
    assert not {seed for _, seed in other.seen} & {seed for _, seed in seen[0]}


def test_a_seed_of_any_size(source: Folder, plan: Plan) -> None:
    kind = Line()
    Accelerated(kind, source, replace(plan, steps=1, seed=20_240_501), process()).run()
    assert len({seed for _, seed in kind.seen}) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"nothing", "cannot be read; delete it"), ({"step": 1}, "lacks about, average, losses"), ([1], "is no state of")],
)
def test_another_file_is_no_state(content: Any, said: str, source: Folder, plan: Plan) -> None:
    plan.folder.mkdir(parents=True)
    if isinstance(content, bytes):
        (plan.folder / STATE).write_bytes(content)
    else:
        torch.save(content, plan.folder / STATE)
    with pytest.raises(ValueError, match=said):
        Accelerated(Line(), source, plan, process())


def test_a_step(source: Folder, plan: Plan) -> None:
    """Its parts count as their mean, each step by itself, a gradient of more than 1 as 1."""
    kind = Line(told=[1.0, 2.0, 3.0, 5.0])
    made = Accelerated(kind, source, replace(plan, steps=2), process())
    assert made.run() == [1.5, 4.0]
    group, used = made.optimiser.param_groups[0], kind.modules["used"]
    assert (group["lr"], group["weight_decay"]) == (0.1, 1e-2)
    assert float(made.optimiser.state[used]["exp_avg"]) == pytest.approx(0.1 * 0.5 * 0.9 + 0.1 * 0.5)
    steep = Accelerated(Line(slope=4.0), source, replace(plan, steps=1, folder=plan.folder / "steep"), process())
    steep.run()
    assert float(steep.optimiser.state[steep.kind.modules["used"]]["exp_avg"]) == pytest.approx(0.1)


def test_gradients_are_shared(source: Folder, plan: Plan) -> None:
    """Their mean, and that of the losses; a part that no row used has none, and what others have of it."""
    made = Accelerated(Line(), source, replace(plan, steps=1), process(0, 2, others=0.1))
    assert made.run() == [pytest.approx(2.1 / 2)]
    moments = {name: float(made.optimiser.state[each]["exp_avg"]) for name, each in made.kind.modules.items()}
    assert moments == pytest.approx({"used": 0.1 * (0.5 + 0.1) / 2, "unused": 0.1 * 0.1 / 2})


def test_what_is_written(source: Folder, plan: Plan) -> None:
    """The weights' average, by the main process; as often as the plan says, and at the end."""
    made = Accelerated(Line(), source, replace(plan, steps=1), process())
    made.run()
    now = float(made.kind.modules["used"].detach())
    assert now != 1
    # The first step counts nine times as much as what was there before.
    average = load_file(plan.folder / "line.safetensors")["used"]
    assert float(average) == pytest.approx(0.1 * 1 + 0.9 * now)
    silent = replace(plan, folder=plan.folder / "silent")
    Accelerated(Line(), source, silent, process(1, 2)).run()
    assert not silent.folder.exists()
    broken = replace(plan, steps=9, folder=plan.folder / "broken", save_every=2)
    told = [2.0] * 10 + [float("inf")] * 2
    with pytest.raises(ValueError, match="The loss is inf at step 6; lower the rate, or train in bf16 or fp32"):
        Accelerated(Line(told=told), source, broken, process()).run()
    state = torch.load(broken.folder / STATE, weights_only=True)
    assert (state["step"], len(state["losses"])) == (4, 4)
    kept = Accelerated(Line(told=[7.0] * 2), source, replace(broken, steps=5), process())
    assert kept.run() == [2.0] * 4 + [7.0]


def test_another_training_does_not_go_on(source: Folder, plan: Plan) -> None:
    first = Line(settings={"rank": 2})
    Accelerated(first, source, replace(plan, steps=1), process()).run()
    other, sized, elsewhere = Line(settings={"rank": 2}), Line(settings={"rank": 3}), Line(settings={"rank": 2})
    other.name, elsewhere.frozen.fingerprints = "another", {"checkpoint": "b"}
    for kind, changed, at, said in (
        (other, {}, process(), "kind line, now it is another"),
        (sized, {}, process(), "rank 2, now it is 3"),
        (elsewhere, {}, process(), "checkpoint a, now it is b"),
        (first, {"batch": 2}, process(), "batch 1, now it is 2"),
        (first, {"accumulation": 1}, process(), "accumulation 2, now it is 1"),
        (first, {"seed": 3}, process(), "seed 0, now it is 3"),
        (first, {"size": 128}, process(), "size 64, now it is 128"),
        (first, {"average": 0.9}, process(), "average 0.5, now it is 0.9"),
        (first, {}, process(0, 2), "processes 1, now it is 2"),
    ):
        with pytest.raises(ValueError, match=f"was begun with {said}; take the same, or another folder"):
            Accelerated(kind, source, replace(plan, **changed), at)


def test_one_that_goes_on_takes_another_rate(source: Folder, plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    """For each part of what learns what the kind makes of it, and the log says so."""
    Accelerated(Line(), source, replace(plan, steps=1), process()).run()
    assert "rate" not in capsys.readouterr().out
    same, slower = Line(), Line()
    Accelerated(same, source, replace(plan, steps=2), process()).run()
    assert "rate" not in capsys.readouterr().out
    before = float(same.modules["used"].detach())
    made = Accelerated(slower, source, replace(plan, rate=1e-3), process())
    assert "from step 3 on the rate is 0.001, before it was 0.1" in capsys.readouterr().out
    made.run()
    assert abs(float(slower.modules["used"].detach()) - before) < 2e-3
    assert torch.load(plan.folder / STATE, weights_only=True)["optimiser"]["param_groups"][0]["lr"] == 1e-3
