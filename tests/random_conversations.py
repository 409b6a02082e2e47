"""Random conversations on an engine: after each step what the cache gives is compared with prefilling everything."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hybrid_rt.engine import Engine
from hybrid_rt.generation import collect
from hybrid_rt.latent_store import LatentStore
from hybrid_rt.sampling import Sampling

NEW_TOKENS = 10


@dataclass
class RandomConversation:
    """Turns as R1's template has them: an answer's thinking is not part of what the next turn sees.

    worst: the largest difference of logits so far, relative to the largest logit. reused: tokens that were not run.
    """

    engine: Engine
    folder: Path
    seed: int
    worst: float = 0.0
    reused: int = 0
    dice: random.Random = field(init=False)

    def run(self) -> None:
        self.dice = random.Random(self.seed)
        self.session, self.history = self.engine.session(), [0]
        for _ in range(self.dice.randint(2, 5)):
            self.session = self.turn(self.move())

    def move(self) -> str:
        """Something that may happen between two turns."""
        what = self.dice.choice(["nothing", "fork", "disk", "single file", "undo", "background"])
        if what == "undo":
            self.history = self.history[: self.dice.randint(1, len(self.history))]
        return what

    def turn(self, what: str):  # type: ignore[no-untyped-def]
        """Continue in the same session, a fork of it, or one from disk; returns the session."""
        session = self.session
        if what == "fork":
            session = session.fork()
        if what in ("disk", "background"):
            store = LatentStore(self.engine, folder=self.folder)
            store.keep(session)
            session = self.engine.session() if what == "disk" else session
            store.restore(session, self.history)
            if what == "background":
                session.extend(self.history[session.keep_common(self.history) :])
        if what == "single file":
            session.save(self.folder / "one.file")
            session = self.engine.session()
            session.load(self.folder / "one.file")
        self.compare(session)
        return session

    def compare(self, session) -> None:  # type: ignore[no-untyped-def]
        """A prompt behind the history: logits, then greedy tokens, beside those of a session that knows nothing."""
        high = self.engine.tokenizer.vocab_size
        asked = [self.dice.randrange(4, high) for _ in range(self.dice.choice([1, 3, 20, 150]))]
        prompt = [*self.history, *asked]
        known, mine = session.prefill(prompt)
        self.reused += known
        fresh = self.engine.session()
        theirs = fresh.prefill(prompt)[1]
        assert theirs.isfinite().all() and mine.isfinite().all()
        self.worst = max(self.worst, float((mine - theirs).abs().max() / theirs.abs().max()))
        greedy = Sampling(temperature=0, max_new_tokens=NEW_TOKENS)
        answer = collect(session.generate(prompt, greedy)).token_ids
        assert answer == collect(fresh.generate(prompt, greedy)).token_ids, f"seed {self.seed}"
        dropped = self.dice.randint(0, len(answer))  # the thinking
        self.history = [*prompt, *answer[dropped:], 1]


def check(engine: Engine, folder: Path, seeds: range) -> tuple[float, int]:
    """The worst difference over all conversations and the tokens that were reused."""
    worst, reused = 0.0, 0
    with torch.inference_mode():
        for seed in seeds:
            conversation = RandomConversation(engine, folder, seed)
            conversation.run()
            worst, reused = max(worst, conversation.worst), reused + conversation.reused
    return worst, reused
