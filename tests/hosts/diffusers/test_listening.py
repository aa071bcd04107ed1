"""Pipelines that read an encoder by forward hooks on its parts, which followers do not run."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")

from hosting import no_warnings, parallel  # noqa: E402
from written import N, listener  # noqa: E402


def run(pipe: Any) -> Any:
    words = torch.linspace(-1, 1, 8)
    return pipe(words, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_followers_hear_what_the_leaders_parts_say(mode: str) -> None:
    pipe = listener()
    alone = run(pipe)
    with parallel(pipe, 3, mode=mode) as together, no_warnings():
        for _ in range(2):
            assert torch.equal(run(together), alone)
            assert together.report.fallback is None and together.report.evaluations[2] > 0
    assert not any(part._forward_hooks for part in pipe.text_encoder.modules())


def test_the_users_own_hooks_hear_the_leader_alone() -> None:
    pipe, heard = listener(), []
    pipe.text_encoder.inner.register_forward_hook(lambda part, args, out: heard.append(out))
    with parallel(pipe, 3) as together, no_warnings():
        run(together)
    assert len(heard) == 1 and together.report.evaluations[2] > 0 and N > 3
