"""One process that starts the others, for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.distributed.runs import Processes


@pytest.fixture(scope="session")
def processes():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    made = Processes()
    yield made
    made.close()
