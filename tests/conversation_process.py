"""A program that holds a conversation, to be killed: `python -m tests.conversation_process MODEL FOLDER`.

It loads the model once. For each line on its input it forks a child, which resumes the latest conversation or begins
one, and says `pid N`, then for each answer, once it is complete, `shown ID {"user": ..., "answer": ...}`.
"""

import json
import os
import sys
from pathlib import Path

from hybrid_rt.engine import Engine
from hybrid_rt.latent_store import LatentStore
from hybrid_rt.sampling import Sampling
from hybrid_rt.saved_conversations import SavedConversations
from hybrid_rt.talk import Talk

CONTEXT = 512
LONG = 400  # tokens, after which a new conversation begins


def tell(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def talk_for_ever(engine: Engine, folder: Path) -> None:
    """Ask and answer until somebody kills this process."""
    tell(f"pid {os.getpid()}")
    talk = Talk(engine, "tiny", SavedConversations(folder / "sessions"), LatentStore(engine, folder=folder / "latents"))
    talk.begin("Be brief.")
    latest = talk.saved.latest()
    if latest is not None:
        talk.resume(latest)
    count = 0
    while True:
        if len(talk.history_ids()) > LONG:
            talk.begin()
        count += 1
        talk.ask(f"{os.getpid()} {count}")
        list(talk.answer(Sampling(temperature=0, max_new_tokens=12), think=count % 2 == 0))
        assert talk.log is not None
        turn = talk.conversation.turns[-1]
        tell(f"shown {talk.log.path.stem} {json.dumps({'user': turn.user, 'answer': turn.answer})}")
        talk.prepare()


def main() -> None:
    engine = Engine.load(sys.argv[1], context=CONTEXT, dtype="float32", threads=1)
    engine.generate(engine.prompt_ids([{"role": "user", "content": "warm"}]), Sampling(max_new_tokens=1))
    tell("ready")
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            talk_for_ever(engine, Path(sys.argv[2]))
        os.waitpid(child, 0)
        tell("ended")


if __name__ == "__main__":
    main()
