"""Conversations on disk: nothing is lost to a kill, damage is left out, two processes do not write at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_rt.conversation import (
    Conversation,
    Turn,
    answered,
    ask,
    begin,
    forget,
    part,
    text_event,
    to_json,
    to_markdown,
)
from hybrid_rt.event_log import EventLog, InUseError, is_in_use, read_events
from hybrid_rt.saved_conversations import SavedConversations
from quant.errors import Dsr1Error

EVENTS = [
    begin("nano-r1", "2026-01-01T00:00:00"),
    text_event("system", "Be brief."),
    ask("1+1?"),
    part("ea", ""),
    part("sy", "tw"),
    answered(Turn("1+1?", "easy", "two", "stop")),
    ask("2+2?"),
]


def write(path: Path, events: list[dict] = EVENTS) -> None:
    log = EventLog.open(path)
    for event in events:
        log.append(event)
    log.close()


def test_events_come_back(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    assert read_events(tmp_path / "a.jsonl") == EVENTS
    conversation = Conversation.replay(EVENTS)
    assert conversation.turns == [Turn("1+1?", "easy", "two", "stop"), Turn("2+2?")]
    assert conversation.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "2+2?"},
    ]


def test_parts_of_an_answer_that_was_cut_short() -> None:
    assert Conversation.replay(EVENTS[:5]).turns == [Turn("1+1?", "easy", "tw")]


def test_every_cut_of_the_file_loses_at_most_the_line_that_it_cuts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        assert read_events(path) == EVENTS[:kept]
        if cut % 31 == 0:
            log = EventLog.open(path)
            assert (log.events, log.damaged) == (EVENTS[:kept], 0)
            log.append(ask("next"))
            log.close()
            assert read_events(path) == [*EVENTS[:kept], ask("next")]


def test_every_damaged_byte_costs_at_most_two_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        found = read_events(path)
        assert len(found) >= len(EVENTS) - 2 and all(event in EVENTS for event in found)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    path = tmp_path / "20260101-000000-abcd.jsonl"
    log = EventLog.open(path)
    code = "import sys, pathlib; from hybrid_rt.event_log import EventLog; EventLog.open(pathlib.Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "InUseError" in second.stderr and "is open in another dsr1" in second.stderr
    assert is_in_use(path)
    with pytest.raises(InUseError):
        EventLog.open(path)
    log.close()
    assert not is_in_use(path)
    EventLog.open(path).close()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Dsr1Error, match="cannot be written"):
        EventLog.open(tmp_path / "file" / "a.jsonl")


def test_forgetting() -> None:
    conversation = Conversation(turns=[Turn(str(i), finish="stop") for i in range(5)])
    conversation.apply(forget(first=1))
    conversation.apply(forget(last=2))
    assert [turn.user for turn in conversation.turns] == ["1", "2"]
    for event in (forget(last=9), forget(first=9), {"kind": "forget", "first": "x", "last": -3}, {"kind": "later"}):
        conversation.apply(event)
    assert conversation.turns == []


def test_a_summary_stands_for_the_turns() -> None:
    conversation = Conversation.replay([*EVENTS, text_event("summary", "We added.")])
    assert conversation.turns == []
    assert "We added." in conversation.messages()[0]["content"]


def test_finding_conversations(tmp_path: Path) -> None:
    saved = SavedConversations(tmp_path)
    assert saved.latest() is None
    write(tmp_path / "20260101-000000-aaaa.jsonl", [*EVENTS, text_event("name", "sums")])
    write(tmp_path / "20260102-000000-bbbb.jsonl")
    write(tmp_path / "20260103-000000-cccc.jsonl", EVENTS[:1])  # nothing was asked
    (tmp_path / "20260104-000000-dddd.jsonl").write_bytes(b"\xff\x00 no journal")
    (tmp_path / "other.jsonl").write_text("x")
    assert {found.id[-4:] for found in saved.list()} == {"aaaa", "bbbb"}
    assert saved.find("sums").id.endswith("aaaa") and saved.find("20260102").id.endswith("bbbb")
    with pytest.raises(Dsr1Error, match="2 conversations begin with"):
        saved.find("2026")
    with pytest.raises(Dsr1Error, match="there is no conversation"):
        saved.find("nothing")
    latest = saved.latest()
    assert latest is not None
    log = saved.open(latest)
    other = saved.latest()
    assert other is not None and other.id != latest.id
    log.close()


def test_export() -> None:
    conversation = Conversation.replay(EVENTS[:6])
    text = to_markdown(conversation)
    assert "**You**\n\n1+1?" in text and "> easy" in text and "**Answer**\n\ntwo" in text
    record = json.loads(json.dumps(to_json(conversation)))
    assert record["messages"][-1] == {"role": "assistant", "content": "two", "reasoning": "easy"}
