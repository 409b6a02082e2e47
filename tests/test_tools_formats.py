"""The tools that compare formats on nano-r1's own predictions."""

import torch

from hybrid_rt import Engine
from hybrid_rt.models import NANO_R1
from tools.formats.divergence import dialogues, ratio, read_all


def test_models_are_compared_window_by_window() -> None:
    reference = Engine.load(NANO_R1, dtype="float32", threads=1)
    rounded = Engine.load(NANO_R1, dtype="bfloat16", threads=1)
    found, sizes = read_all({"same": reference, "rounded": rounded}, reference, dialogues(1))
    assert len(sizes) == 6 and all(len(scores.kl) == sum(sizes) for scores in found.values())
    assert torch.equal(found["same"].kl, torch.zeros(sum(sizes), dtype=torch.float64))
    assert 0 < found["rounded"].kl.mean() < 1e-2
    times = ratio(found["rounded"].kl, 2 * found["rounded"].kl, sizes)
    assert abs(times.value - 0.5) < 1e-3 and times.low <= times.value <= times.high
