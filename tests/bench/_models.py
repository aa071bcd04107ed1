"""The trained models of benches: those of the demo, and the judge, which is never tuned on."""

from __future__ import annotations

from parastep import demo
from parastep.demo.common import Model

NAMES = (*demo.NAMES, "signs")


def load(name: str) -> Model:
    """The model of that name, one of `NAMES`."""
    if name != "signs":
        return demo.load(name)
    from _signs import MODEL

    return MODEL
