"""Without a GPU all of this is skipped."""

import pytest
import torch


@pytest.fixture(autouse=True)
def needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU, or torch is not its build for CUDA")
