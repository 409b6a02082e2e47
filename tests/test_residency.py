"""Experts copied into the memory of nodes: how records are split, how they are read, and that they compute the same."""

import ctypes
import mmap
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import memory
from offload.backend import CpuBackend
from offload.benchmark.limits import expert_ranges, range_bytes
from offload.benchmark.weights import random_records
from offload.experts import CpuExperts, ExpertBuffers, PackedExperts
from offload.memory import HUGE_PAGE, OnceRead, bind, check_lockable, huge_memory, lock, run_near
from offload.node_experts import NOT_BOUND, NodeExperts, copy_records, split_records
from offload.topology import Topology, read_topology
from quant.config import parse_config
from quant.errors import DeviceError, StoreError
from quant.packed import PACKED_FORMATS, ExpertRecord, PackedFormat, tiles
from quant.safetensors_file import FileSpan
from tests.page_cache import cached_pages, skip_in_ram, write_to_disk
from tests.tiny_checkpoint import TINY
from tools.residency import Setup, measure

CONFIG = parse_config(TINY)
DIM, EXPERTS, TOP_K = CONFIG.dim, CONFIG.n_routed_experts, CONFIG.n_activated_experts
CAPACITY = 12
ONE = Topology((read_topology().nodes[0],))
TWO = Topology(ONE.nodes * 2)  # one node that pretends to be two

records = st.builds(
    ExpertRecord, st.sampled_from(list(PACKED_FORMATS.values())), st.integers(1, 700), st.integers(1, 700)
)


def make_records(fmt: PackedFormat) -> PackedExperts:
    record = ExpertRecord(fmt, DIM, CONFIG.moe_inter_dim)
    return PackedExperts(random_records(record, EXPERTS, seed=0), record)


def route(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) [tokens, TOP_K]."""
    return torch.rand(tokens, EXPERTS).argsort(1)[:, :TOP_K].contiguous(), torch.rand(tokens, TOP_K)


def places(record: ExpertRecord) -> list[tuple[int, tuple[int, int]]]:
    """Where w1, w3 and w2 begin, and their shapes."""
    up = (record.inter_dim, record.dim)
    return [(record.w1, up), (record.w3, up), (record.w2, up[::-1])]


@settings(max_examples=60, deadline=None)
@given(record=records, nodes=st.integers(1, 9))
def test_every_byte_of_an_expert_is_in_one_nodes_share(record: ExpertRecord, nodes: int) -> None:
    shares = split_records(record, nodes)
    ends = [begin + record.format.nbytes(shape) for begin, shape in places(record)]
    for matrix, (begin, _) in enumerate(places(record)):
        at = begin
        for share in shares:  # one node after the other, from the first byte to the last
            piece = share.pieces[matrix]
            assert piece.begin == at and piece.skipped == at - begin
            at += piece.nbytes
        assert at == ends[matrix]
    for share in shares:
        at = 0
        for piece in share.pieces:
            assert piece.place % 64 == 0 and piece.place >= at
            at = piece.place + piece.nbytes
        assert at <= share.nbytes < at + 64 and share.nbytes % 64 == 0
    assert sum(share.nbytes for share in shares) <= record.nbytes + 3 * 64 * nodes


@settings(max_examples=60, deadline=None)
@given(record=records, nodes=st.integers(1, 9))
def test_shares_are_whole_blocks_of_hidden_values_and_tiles_of_the_output(record: ExpertRecord, nodes: int) -> None:
    (_, up), _, (_, down) = places(record)
    blocks = -(-record.inter_dim // 128)
    for n, share in enumerate(split_records(record, nodes)):
        w1, w3, w2 = share.pieces
        rows = [min(16 * tiles(up), 128 * (blocks * number // nodes)) for number in (n, n + 1)]
        assert [w1.skipped, w1.skipped + w1.nbytes] == [row // 16 * record.format.tile_bytes(up) for row in rows]
        assert (w3.skipped, w3.nbytes) == (w1.skipped, w1.nbytes)
        columns = [tiles(down) * number // nodes for number in (n, n + 1)]
        assert [w2.skipped, w2.skipped + w2.nbytes] == [tile * record.format.tile_bytes(down) for tile in columns]


def write_records(folder: Path, experts: torch.Tensor, before: int = 4096) -> FileSpan:
    path = folder / "layer.bin"
    path.write_bytes(bytes(before) + experts.numpy().tobytes() + b"behind")
    return FileSpan(path, before, experts.nbytes)


def random_experts(record: ExpertRecord, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, record.nbytes), np.uint8))


def bytes_at(address: int, nbytes: int) -> bytes:
    return ctypes.string_at(address, nbytes)


@settings(max_examples=25, deadline=None)
@given(record=records, nodes=st.integers(1, 5), count=st.integers(1, 3))
def test_biased_addresses_lead_to_the_bytes_of_every_tile(
    tmp_path_factory: pytest.TempPathFactory, record: ExpertRecord, nodes: int, count: int
) -> None:
    experts = random_experts(record, count)
    span = write_records(tmp_path_factory.mktemp("split"), experts)
    notes: list[str] = []
    copied = copy_records(span, record, Topology(ONE.nodes * nodes), notes)
    assert len(copied.parts) == nodes and set(notes) <= {NOT_BOUND}
    table, shares, found = copied.table(), split_records(record, nodes), 0
    assert table.shape == (nodes * count, 3) and table.dtype == torch.int64
    for row, addresses in enumerate(table.tolist()):
        node, expert = divmod(row, count)
        for (begin, shape), piece, address in zip(places(record), shares[node].pieces, addresses, strict=True):
            size = record.format.tile_bytes(shape)
            for tile in range(piece.skipped // size, (piece.skipped + piece.nbytes) // size):
                original = experts[expert, begin + tile * size : begin + (tile + 1) * size].numpy().tobytes()
                assert bytes_at(address + tile * size, size) == original
                found += 1
    assert found == count * sum(tiles(shape) for _, shape in places(record))


@pytest.mark.parametrize("fmt", PACKED_FORMATS.values(), ids=PACKED_FORMATS)
@pytest.mark.parametrize("tokens", [1, CAPACITY])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_copied_experts_compute_the_same_bits(fmt: PackedFormat, tokens: int, nodes: int, tmp_path: Path) -> None:
    packed, backend = make_records(fmt), CpuBackend()
    buffers = ExpertBuffers(CONFIG, backend, CAPACITY)
    topology = Topology(ONE.nodes * nodes)
    copied = copy_records(write_records(tmp_path, packed.records), packed.record, topology, [])
    x, (ids, weights) = torch.randn(tokens, DIM).bfloat16(), route(tokens)
    here, there = (CpuExperts(experts, backend, buffers) for experts in (packed, copied))
    expected = here.sync(here.submit(x, ids, weights))
    assert expected.any() and torch.equal(there.sync(there.submit(x, ids, weights)), expected)
    assert expected.isfinite().all()


def test_copied_experts_are_read_by_the_measurement_of_bandwidth(tmp_path: Path) -> None:
    packed, backend = make_records(next(iter(PACKED_FORMATS.values()))), CpuBackend()
    copied = copy_records(write_records(tmp_path, packed.records), packed.record, ONE, [])
    layer = CpuExperts(copied, backend, ExpertBuffers(CONFIG, backend, 1))
    whole = range_bytes(expert_ranges([layer], 2**40))
    assert copied.parts[0].nbytes - 4096 * EXPERTS < whole <= copied.parts[0].nbytes


def test_parts_that_do_not_fit_the_record_are_refused() -> None:
    packed = make_records(next(iter(PACKED_FORMATS.values())))
    [share] = split_records(packed.record, 1)
    good = torch.zeros(3, share.nbytes, dtype=torch.uint8)
    for parts in ((good[:, :-64].contiguous(),), (good, good), (good[:, ::2],), (good.view(torch.int8),)):
        with pytest.raises(ValueError, match="are not a layer's experts"):
            NodeExperts(parts, packed.record)
    other = NodeExperts((good,), packed.record)
    wider = replace(CONFIG, dim=2 * DIM)
    with pytest.raises(ValueError, match="columns are not those"):
        CpuExperts(other, CpuBackend(), ExpertBuffers(wider, CpuBackend(), 1))


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    packed = make_records(next(iter(PACKED_FORMATS.values())))
    span = write_records(tmp_path, packed.records[:-1])
    with pytest.raises(StoreError, match="became shorter"):
        copy_records(FileSpan(span.path, span.begin, packed.records.nbytes), packed.record, TWO, [])


def test_memory_is_aligned_zero_and_freed_with_its_last_view() -> None:
    for nbytes in (0, 5, HUGE_PAGE + 4096):
        fresh = huge_memory(nbytes)
        assert fresh.shape == (nbytes,) and fresh.dtype == torch.uint8 and not fresh.any()
        assert nbytes == 0 or fresh.data_ptr() % HUGE_PAGE == 0
    view = huge_memory(64 * HUGE_PAGE)[HUGE_PAGE:]
    view.fill_(1)
    address = view.data_ptr()
    assert mapped_at(address)
    del view
    assert not mapped_at(address)


def mapped_at(address: int) -> bool:
    lines = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", Path("/proc/self/maps").read_text(), re.MULTILINE)
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in lines)


def smaps(address: int) -> dict[str, str]:
    """What Linux tells of the mapping that holds `address`."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(word, 16) for word in block.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            return dict(re.findall(r"^(\w+):\s+(.+)$", block, re.MULTILINE))
    raise AssertionError("not mapped")


def thp_is_granted() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not thp_is_granted(), reason="this system has no transparent huge pages")
def test_copies_lie_in_huge_pages() -> None:
    fresh = huge_memory(4 * HUGE_PAGE)
    assert smaps(fresh.data_ptr())["VmFlags"].split().count("hg") == 1
    fresh.fill_(1)
    assert int(smaps(fresh.data_ptr())["AnonHugePages"].split()[0]) % (HUGE_PAGE // 1024) == 0


def test_binding_to_a_node_that_is_there_and_to_one_that_is_not() -> None:
    fresh, here = huge_memory(HUGE_PAGE), read_topology().nodes[0].number
    if not bind(fresh, here):
        pytest.skip("this system does not let memory be bound")
    fresh.fill_(1)
    policies = Path("/proc/self/numa_maps")
    if policies.exists():
        [policy] = re.findall(rf"^{fresh.data_ptr():x} (\S+)", policies.read_text(), re.MULTILINE)
        assert policy == f"bind:{here}"
    assert not bind(fresh, 900) and not bind(fresh, 5000)


def test_memory_that_cannot_be_bound_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("offload.node_experts.bind", lambda *_: False)
    packed = make_records(next(iter(PACKED_FORMATS.values())))
    span, notes = write_records(tmp_path, packed.records), ["another"]
    for topology in (ONE, TWO, TWO):
        copy_records(span, packed.record, topology, notes)
    assert notes == ["another", NOT_BOUND]


def test_what_was_read_once_leaves_the_page_cache(tmp_path: Path) -> None:
    skip_in_ram(tmp_path)
    path = tmp_path / "file"
    write_to_disk(path, os.urandom(4 << 20))
    target = torch.zeros(2 << 20, dtype=torch.uint8)
    with OnceRead(path) as source:
        source.read(1 << 20, target)
    assert target.numpy().tobytes() == path.read_bytes()[1 << 20 : 3 << 20]
    with OnceRead(path) as source:
        source.forget(0, 4 << 20)
    assert cached_pages(path) == 0
    path.read_bytes()
    assert cached_pages(path) > 0


def test_jobs_run_on_the_processors_of_their_node_and_errors_come_back() -> None:
    cpu, seen = min(os.sched_getaffinity(0)), []

    def job() -> None:
        seen.append((os.sched_getaffinity(0), threading.get_ident()))

    def failing() -> None:
        raise OSError("a disk")

    before = os.sched_getaffinity(0)
    run_near([((cpu,), [job] * 3), (sorted(before), [job])])
    assert [cpus for cpus, _ in seen].count({cpu}) >= 3 and os.sched_getaffinity(0) == before
    assert threading.get_ident() not in [thread for _, thread in seen]
    with pytest.raises(OSError, match="a disk"):
        run_near([((cpu,), [job, failing, job])])


def map_file(path: Path) -> torch.Tensor:
    with path.open("rb") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)


def test_locked_memory_is_in_ram_and_not_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(16 * mmap.PAGESIZE))
    whole = map_file(path)
    lock(whole[mmap.PAGESIZE + 5 : 3 * mmap.PAGESIZE])
    told = smaps(whole.data_ptr() + mmap.PAGESIZE)
    assert told["Locked"] == "8 kB" and told["Anonymous"] == "0 kB"
    assert told["VmFlags"].split().count("lo") == 1
    assert whole.numpy().tobytes() == path.read_bytes()


def test_a_limit_on_locking_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "lockable", lambda: 2**23)
    check_lockable(2**23)
    with pytest.raises(DeviceError, match=r"8\.0 MiB.*ulimit -l unlimited.*--residency mapped"):
        check_lockable(2**23 + 1)
    monkeypatch.setattr(memory, "lockable", lambda: None)
    check_lockable(2**60)


def test_a_lock_that_the_system_refuses_is_told() -> None:
    class Nowhere:
        nbytes = 5

        def data_ptr(self) -> int:
            return 2**62

    with pytest.raises(DeviceError, match="5 bytes of routed experts cannot be locked"):
        lock(Nowhere())  # type: ignore[arg-type]


def test_the_measurement_tells_of_every_residency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = ExpertRecord(PACKED_FORMATS["fast"], DIM, CONFIG.moe_inter_dim)
    measure(Setup(CONFIG, record, EXPERTS), tmp_path, rounds=8)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines] == ["mapped", "mapped", "locked", "copied", "copied", *["mapped"] * 3, "copied"]
    assert all(re.search(r"\d GB/s", line) for line in lines)
