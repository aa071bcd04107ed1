"""Between tests, capsules made by hand are let go of."""

import pytest
from handmade import Handmade


@pytest.fixture(autouse=True)
def let_go_of_handmade_tensors():
    yield
    Handmade.alive.clear()
