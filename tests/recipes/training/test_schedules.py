from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
from recipes.training.schedules import Schedule, make_schedulers


def rates(schedule, steps_per_epoch=4, epochs=3, lr=0.5, **options):
    """Return the learning rates and temperatures of a run."""
    optimizer = bl.VOGN(bl.BayesLinear(2, 1), 10, lr=lr, temperature=2.0, **options)
    schedulers, seen = make_schedulers(schedule, optimizer, steps_per_epoch, epochs), []
    for _ in range(steps_per_epoch * epochs):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["temperature"]))
        with optimizer.sampled():
            optimizer.model(torch.ones(1, 2)).square().mean().backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return torch.tensor(seen, dtype=torch.float64).T


def test_cosine_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12), []
    for _ in range(12):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found, temperature = rates(Schedule())
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert set(temperature.tolist()) == {2.0}


def test_step_and_exponential_change_by_the_epoch():
    assert_close(rates(Schedule("step", gamma=0.1, milestones=[1, 2]))[0][::4].tolist(), [0.5, 0.05, 0.005])
    assert_close(rates(Schedule("exponential", gamma=0.9))[0].tolist(), [0.5] * 4 + [0.45] * 4 + [0.405] * 4)
    assert_close(rates(Schedule("constant"))[0].tolist(), [0.5] * 12)


def test_trapezoid_falls_to_zero_at_the_end_and_a_longer_run_begins_the_same():
    schedule = Schedule("trapezoid", decay_epochs=1, warmup_epochs=0.5, warmup_start=0.2)
    expected = [0.1, 0.3] + [0.5] * 6 + [0.5, 0.375, 0.25, 0.125]
    assert_close(rates(schedule)[0].tolist(), expected)
    assert_close(rates(schedule, epochs=4)[0][:9].tolist(), expected[:9])
    assert schedule.factor(12, 4, 3) == 0
    assert_close(rates(Schedule("trapezoid", decay_epochs=6))[0][0].item(), 0.25)  # no longer than the run


def test_learning_rate_and_temperature_are_warmed_up():
    schedule = Schedule("constant", warmup_epochs=0.5, warmup_start=0.2, temperature_steps=4, temperature_start=0.5)
    lr, temperature = rates(schedule)
    assert_close(lr[:4].tolist(), [0.1, 0.3, 0.5, 0.5])
    assert_close(temperature[:6].tolist(), [1.0, 1.25, 1.5, 1.75, 2.0, 2.0])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule("cosin"), "schedule.name must be one of .*, got 'cosin'. Did you mean 'cosine'"),
        (Schedule(gamma=0.0), "schedule.gamma must be a finite number > 0, got 0.0"),
        (Schedule("trapezoid", decay_epochs=0), "schedule.decay_epochs must be a finite number > 0, got 0"),
        (Schedule(warmup_epochs=-1), "schedule.warmup_epochs must be a finite number >= 0, got -1"),
        (Schedule(warmup_start=0), r"schedule.warmup_start must be in \(0, 1\], got 0"),
        (Schedule(temperature_start=math.nan), r"schedule.temperature_start must be in \(0, 1\], got nan"),
    ],
)
def test_bad_schedules_are_refused_by_name(schedule, message):
    with pytest.raises(ValueError, match=message):
        schedule.check()


def test_temperature_of_a_point_estimate_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    with pytest.raises(ValueError, match="optimizer must have a temperature, got SGD"):
        make_schedulers(Schedule(temperature_steps=3), optimizer, 4, 3)
