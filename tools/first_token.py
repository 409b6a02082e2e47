"""How long the first token of each turn takes: `python -m tools.first_token [MODEL]` (docs/chat.md).

Ten turns with questions and answers of equal length; medians over conversations, beside a session that knows nothing.
"""

import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from hybrid_rt.engine import Engine
from hybrid_rt.latent_store import LatentStore
from hybrid_rt.sampling import Sampling
from hybrid_rt.saved_conversations import SavedConversations
from hybrid_rt.talk import Talk

CONVERSATIONS, TURNS = 7, 10
SAMPLING = Sampling(temperature=0, max_new_tokens=120)


def converse(engine: Engine, folder: Path, number: int, seconds: dict[int, list[float]], anew: list[float]) -> None:
    """One conversation; adds what each turn's prompt took, and what the last one's takes from nothing."""
    talk = Talk(engine, "model", SavedConversations(folder / "s"), LatentStore(engine, folder=folder / f"l{number}"))
    talk.begin()
    for turn in range(1, TURNS + 1):
        talk.ask(f"What is {111 + 10 * turn + number} + {345 + turn}?")
        steps = list(talk.answer(SAMPLING))
        seconds[turn].append(steps[0].timings.prefill_s)
        talk.prepare()
        talk.wait()
    ids = talk.history_ids()
    anew.append(next(iter(engine.generate(ids, SAMPLING))).timings.prefill_s)
    talk.leave()


def main() -> None:
    engine = Engine.load(sys.argv[1] if len(sys.argv) > 1 else None)
    seconds: dict[int, list[float]] = defaultdict(list)
    anew: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(CONVERSATIONS):
            converse(engine, Path(folder), number, seconds, anew)
    for turn, taken in seconds.items():
        print(f"turn {turn:2}: {1e3 * statistics.median(taken):6.2f} ms")
    ratio = statistics.median(seconds[TURNS]) / statistics.median(seconds[2])
    print(f"turn {TURNS} / turn 2: {ratio:.2f}; all of the conversation anew: {1e3 * statistics.median(anew):.2f} ms")


if __name__ == "__main__":
    main()
