"""`_core.check_options` refuses what a Leader refuses, before there is a program or a latent."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
from cases import euler, latents

from parastep import _core

BAD = [
    {"tolerance": -0.01},
    {"tolerance": math.nan},
    {"tolerance": "0.1"},
    {"tolerance": None},
    {"policy": "Verified"},
    {"policy": None},
    {"order": 2},
    {"order": 0.5},
    {"max_stride": 0},
    {"max_stride": 10**30},
    {"max_stride": "1"},
    {"warmup": 0},
    {"warmup": None},
    {"deadline": 0},
    {"deadline": math.nan},
    {"deadline": "60"},
    {"on_failure": "stop"},
    {"on_failure": 1},
    {"tolerance": -1, "warmup": 0},  # the first one that is found is named
]

GOOD = [
    {},
    {"tolerance": 0, "policy": "paper", "order": 0, "max_stride": 1, "warmup": 1},
    {"tolerance": math.inf, "max_stride": None, "deadline": None, "on_failure": "raise"},
    {"deadline": math.inf},
]


def refusal(call: Any) -> tuple[type, str]:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("options", BAD, ids=str)
def test_what_a_leader_refuses_is_refused_in_the_same_words(options: dict[str, Any]) -> None:
    program, x = euler(3), latents()
    expected = refusal(lambda: _core.Leader(program, x, **options))
    assert refusal(lambda: _core.check_options(**options)) == expected


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_what_a_leader_takes_is_let_through(options: dict[str, Any]) -> None:
    _core.Leader(euler(3), latents(), **options).finish()
    _core.check_options(**options)


def test_the_options_are_those_of_a_leader() -> None:
    leader = inspect.signature(_core.Leader).parameters
    of_a_run = {"program", "x", "ranks", "slots", "lane", "carriers", "devices"}
    checked = inspect.signature(_core.check_options).parameters
    assert dict(checked) == {k: v for k, v in leader.items() if k not in of_a_run}
    with pytest.raises(TypeError):
        _core.check_options(0.02)  # by keyword alone, as in a Leader
