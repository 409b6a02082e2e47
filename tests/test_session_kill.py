"""kill -9 at random instants of a conversation: nothing that was shown as done is lost, and it goes on each time."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from hybrid_rt.engine import Engine
from hybrid_rt.latent_store import LatentStore
from hybrid_rt.saved_conversations import SavedConversations
from hybrid_rt.talk import Talk
from tests.conversation_process import CONTEXT

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

Shown = dict[str, list[dict[str, str]]]


class Killer:
    """Runs the process, and kills its children."""

    def __init__(self, model: Path, folder: Path) -> None:
        words = [sys.executable, "-m", "tests.conversation_process", str(model), str(folder)]
        self.process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.shown: Shown = defaultdict(list)
        assert self.read() == "ready"

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill_after(self, answers: int, seconds: float) -> None:
        """Start a child and kill it when it has shown so many answers and talked for so long after them."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        pid = int(self.read().removeprefix("pid "))
        lines = iter(self.read, "ended")
        for line in itertools.islice(lines, answers):
            self.note(line)
        threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)).start()
        for line in lines:
            self.note(line)

    def note(self, line: str) -> None:
        _, name, turn = line.split(" ", 2)
        self.shown[name].append(json.loads(turn))

    def close(self) -> None:
        self.process.communicate(timeout=60)


def check(engine: Engine, folder: Path, shown: Shown) -> int:
    """What was shown is there, in order, and the latest conversation goes on; returns how many tokens were cached."""
    saved = SavedConversations(folder / "sessions")
    kept = {found.id: found.conversation for found in saved.list()}
    for name, turns in shown.items():
        done = [{"user": t.user, "answer": t.answer} for t in kept[name].turns if t.finish not in ("", "lost")]
        assert [turn for turn in done if turn in turns] == turns
        assert len(done) <= len(turns) + 1 + len(shown)  # an answer may be on disk before it is shown
    talk = Talk(engine, "tiny", saved, LatentStore(engine, folder=folder / "latents"))
    latest = saved.latest()
    if latest is None:
        return 0
    found = talk.resume(latest)
    assert not found.damaged and not (talk.store and talk.store.notes)
    ids = talk.history_ids()
    if ids:
        mine = talk.session.prefill(ids)[1]
        torch.testing.assert_close(mine, engine.logits(ids)[-1], rtol=1e-4, atol=1e-4)
    talk.leave()
    return found.cached


def kill_often(model: Path, folder: Path, times: int) -> None:
    engine = Engine.load(model, context=CONTEXT, dtype="float32", threads=1)
    dice = random.Random(time.time_ns())
    killer = Killer(model, folder)
    cached = 0
    for _ in range(times):
        killer.kill_after(dice.randint(0, 4), dice.choice([0.0, 0.05, 0.3]) * dice.random())
        cached += check(engine, folder, killer.shown)
    killer.close()
    assert sum(map(len, killer.shown.values())) > 0 and cached > 0


def test_a_few_kills(chat_folder: Path, tmp_path: Path) -> None:
    kill_often(chat_folder, tmp_path, 6)


@pytest.mark.slow
def test_thirty_kills(chat_folder: Path, tmp_path: Path) -> None:
    kill_often(chat_folder, tmp_path, 30)
