"""Options and fixtures of the test run."""

from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "seed of the models compared with transformers, as in the ids of their tests; a new one each run"
    parser.addoption("--reference-seed", type=int, help=help_text)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch with one thread, which is several times faster for matrices as small as those of tests."""
    import torch  # not above: light tests do without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
