"""The learning rate over time, worked by hand, and what the optimizer holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.inputs import IMAGE_SIZE
from utils.model.segmenter import build_model
from utils.runtime.choices import SCHEDULES
from utils.train.optim import build_optimizer, build_scheduler, lr_factor


def factors(schedule: str, total_steps: int, warmup_steps: int, count: int) -> list[float]:
    return [lr_factor(schedule, step, total_steps=total_steps, warmup_steps=warmup_steps) for step in range(count)]


def test_constant() -> None:
    assert factors("constant", 5, 0, 7) == [1.0] * 7


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_full_rate(schedule: str) -> None:
    assert factors(schedule, 100, 4, 5) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_zero_after_the_warm_up() -> None:
    # (1 + cos(pi x)) / 2 at x = 0, 1/4, 1/2, 3/4, 1; and 0 for a step beyond the end.
    expected = [0.5, 1.0, 1.0, 0.8535534, 0.5, 0.1464466, 0.0, 0.0]
    assert factors("cosine", 6, 2, 8) == pytest.approx(expected)


def test_step_divides_by_ten_after_each_third() -> None:
    assert factors("step", 11, 2, 13) == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_as_long_as_the_run_divides_by_nothing(schedule: str) -> None:
    assert factors(schedule, 2, 2, 3) == pytest.approx([0.5, 1.0, 1.0])


def test_the_scheduler_sets_the_rate_of_the_first_step_too() -> None:
    optimizer = build_optimizer(nn.Linear(1, 1), lr=0.4, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, "cosine", total_steps=4, warmup_steps=2)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.2])
    assert scheduler.get_last_lr() == pytest.approx([0.0])


def test_the_optimizer_holds_the_mask_decoder_alone(sam_file: Path) -> None:
    model = build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.02)
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.02)
    held = {id(parameter) for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.mask_decoder.parameters()}
