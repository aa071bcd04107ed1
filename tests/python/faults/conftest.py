"""Whatever happens to a run, no thread stays behind and the next one is as good as the first."""

import threading

import pytest
from cases import euler, exact, latents, same, settle, smooth

import parastep


@pytest.fixture(autouse=True)
def the_process_goes_on():
    """After every test: no thread is left, none ended with an error, and a run is right."""
    errors, before = [], threading.excepthook
    threading.excepthook = errors.append
    yield
    settle()
    threading.excepthook = before
    assert errors == []
    x = latents(seed=9)
    found, report = parastep.sample(euler(4), smooth, x, ranks=3, tolerance="rehearse")
    assert same(found, exact(euler(4), smooth, x))
    assert report.failures == [] and report.evaluations == [4, 3, 2]
