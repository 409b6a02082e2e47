"""Cached tokens on disk: what is restored is exactly what was computed, and nothing foreign or damaged is used."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hybrid_rt.engine import Engine
from hybrid_rt.latent_file import read_latents
from hybrid_rt.latent_store import BLOCK, LatentStore
from quant.errors import CheckpointError
from tests.tiny_checkpoint import write_checkpoint
from tests.tiny_tokenizer import write_tokenizer

TOKENS = [0, *range(4, 4 + 2 * BLOCK + 20)]  # two blocks and a tail of 21


@pytest.fixture(scope="module")
def engine(chat_folder: Path) -> Engine:
    return Engine.load(chat_folder, context=512, dtype="float32", threads=1)


@pytest.fixture
def store(engine: Engine, tmp_path: Path) -> LatentStore:
    return LatentStore(engine, folder=tmp_path / "latents")


def filled(engine: Engine, store: LatentStore, tokens: list[int] = TOKENS) -> None:
    session = engine.session()
    session.append(tokens)
    store.keep(session)


def files(store: LatentStore) -> list[Path]:
    return sorted(store.folder.iterdir())


def test_what_is_restored_is_what_was_computed(engine: Engine, store: LatentStore) -> None:
    filled(engine, store)
    assert len(files(store)) == 3
    session = engine.session()
    assert store.restore(session, [*TOKENS, 7, 8]) == len(TOKENS)
    assert session.tokens == TOKENS
    fresh = engine.session()
    fresh.append(TOKENS)
    assert torch.equal(session.cache.rows(0, 149)["latents"], fresh.cache.rows(0, 149)["latents"])
    assert torch.equal(session.append([7, 8]), fresh.append([7, 8]))


@pytest.mark.parametrize("length", [1, 40, BLOCK, BLOCK + 5, 2 * BLOCK, 2 * BLOCK + 7, len(TOKENS)])
def test_a_sequence_that_begins_alike(engine: Engine, store: LatentStore, length: int) -> None:
    filled(engine, store)
    session = engine.session()
    other = [*TOKENS[:length], 300, 301, 302, *TOKENS[length:]]
    # blocks count as a whole; the tail by the token
    expected = length if length >= 2 * BLOCK else length // BLOCK * BLOCK
    assert store.restore(session, other) == expected
    torch.testing.assert_close(session.prefill(other)[1], engine.logits(other)[-1], rtol=1e-4, atol=1e-4)


def test_what_the_session_has_is_not_read(engine: Engine, store: LatentStore) -> None:
    filled(engine, store)
    session = engine.session()
    session.append(TOKENS[: BLOCK + 30])
    files(store)[0].write_bytes(b"")
    assert store.restore(session, TOKENS) >= BLOCK + 30
    torch.testing.assert_close(session.prefill([*TOKENS, 9])[1], engine.logits([*TOKENS, 9])[-1], rtol=1e-4, atol=1e-4)


def test_blocks_are_written_once(engine: Engine, store: LatentStore) -> None:
    session = engine.session()
    session.append(TOKENS)
    assert store.keep(session) > 0
    before = {path: path.stat().st_ino for path in files(store)}
    session.append([9, 9])
    store.keep(session)
    same = [path for path in files(store) if before.get(path) == path.stat().st_ino]
    assert len(same) == 2 and len(files(store)) == 3  # the tail was replaced


def test_any_damaged_byte_is_noticed(engine: Engine, store: LatentStore) -> None:
    filled(engine, store, TOKENS[: BLOCK + 3])
    cache = engine.new_cache(8)
    for path in files(store):
        whole = path.read_bytes()
        read_latents(path, store.model, cache)
        for place in (0, 7, 9, 30, 60, 100, 200, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
            with pytest.raises(CheckpointError):
                read_latents(path, store.model, cache)
        for cut in (0, 7, 100, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError):
                read_latents(path, store.model, cache)
        path.write_bytes(whole)


def test_a_damaged_block_is_left_out_with_one_line_and_made_again(engine: Engine, store: LatentStore) -> None:
    filled(engine, store)
    for path in files(store):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    session = engine.session()
    assert store.restore(session, TOKENS) == 0
    assert len(store.notes) == 1 and "computed again" in store.notes[0]
    session.extend(TOKENS)
    store.keep(session)
    assert LatentStore(engine, folder=store.folder).restore(engine.session(), TOKENS) == len(TOKENS)


def test_another_model_finds_nothing(engine: Engine, store: LatentStore, tmp_path: Path) -> None:
    filled(engine, store)
    folder = write_checkpoint(tmp_path / "other", seed=3)
    write_tokenizer(folder)
    other = Engine.load(folder, context=512, dtype="float32", threads=1)
    theirs = LatentStore(other, folder=store.folder)
    assert theirs.model != store.model
    assert theirs.restore(other.session(), TOKENS) == 0 and not theirs.notes
    bf16 = Engine.load(engine.folder, context=512, dtype="bfloat16", threads=1)
    assert LatentStore(bf16, folder=store.folder).restore(bf16.session(), TOKENS) == 0
    for path in files(store):  # under the right name, with another model's content
        path.write_bytes(path.read_bytes().replace(store.model.encode(), theirs.model.encode()))
    assert store.restore(engine.session(), TOKENS) == 0 and len(store.notes) == 1


def test_the_least_recently_used_go_first(engine: Engine, store: LatentStore) -> None:
    filled(engine, store)
    size = sum(path.stat().st_size for path in files(store))
    for number, path in enumerate(files(store)):
        os.utime(path, ns=(number, number))
    small = LatentStore(engine, limit=size + 100_000, folder=store.folder)
    small.restore(engine.session(), TOKENS)  # these are used now
    other = [0, *range(200, 200 + 3 * BLOCK)]
    filled(engine, small, other)
    assert sum(path.stat().st_size for path in files(small)) <= small.limit
    assert small.restore(engine.session(), other) > 0
    again = engine.session()
    known = small.restore(again, TOKENS)  # the end of the older conversation went before its beginning
    assert known in (0, BLOCK, 2 * BLOCK)


def test_a_limit_of_nothing_writes_nothing(engine: Engine, tmp_path: Path) -> None:
    store = LatentStore(engine, limit=0, folder=tmp_path / "latents")
    filled(engine, store)
    assert not list((tmp_path / "latents").glob("*"))


def test_a_folder_that_cannot_be_written(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = LatentStore(engine, folder=tmp_path / "file" / "latents")
    filled(engine, store)
    assert len(store.notes) == 1 and "cannot be written" in store.notes[0]


def test_a_disk_that_fills_up(engine: Engine, store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("hybrid_rt.latent_file.save_file", full)
    filled(engine, store)
    assert len(store.notes) == 1 and "No space left" in store.notes[0] and not files(store)


def test_abandoned_files_are_swept_away(engine: Engine, store: LatentStore) -> None:
    filled(engine, store)
    old, new = store.folder / "a.latents.1-1.part", store.folder / "b.latents.1-1.part"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    filled(engine, store)
    assert not old.exists() and new.exists()
