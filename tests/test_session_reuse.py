"""Reuse is exact: continuing from a trimmed, forked or saved cache gives what prefilling everything gives."""

from pathlib import Path

import pytest

from hybrid_rt.engine import Engine
from tests.random_conversations import check

TOLERANCE = 1e-4  # of the largest logit; chunks of other lengths round differently
FEW, MANY = range(6), range(1000, 1200)


@pytest.fixture(scope="module", params=["nano-r1-fp8", "tiny"])
def engine(request: pytest.FixtureRequest, chat_folder: Path) -> Engine:
    model = chat_folder if request.param == "tiny" else request.param
    return Engine.load(model, context=1024, dtype="float32", threads=1)


def test_a_few_random_conversations(engine: Engine, tmp_path: Path) -> None:
    worst, reused = check(engine, tmp_path, FEW)
    assert worst <= TOLERANCE and reused > 100


@pytest.mark.slow
def test_two_hundred_random_conversations(engine: Engine, tmp_path: Path) -> None:
    worst, reused = check(engine, tmp_path, MANY)
    print(f"{engine.folder.name}: worst {worst:.2e}, {reused} tokens reused")
    assert worst <= TOLERANCE and reused > 1000
