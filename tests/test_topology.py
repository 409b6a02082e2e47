"""NUMA nodes, read from folders that look like /sys and /proc."""

from pathlib import Path

import pytest

from offload.hardware import allowed_cpus
from offload.topology import Node, Topology, parse_list, read_topology

MIB = 2**20


def add_node(root: Path, number: int, cpus: str, mib: int, free: int = 0, distances: str = "") -> None:
    folder = root / f"sys/devices/system/node/node{number}"
    folder.mkdir(parents=True)
    sizes = {"MemTotal": mib, "MemFree": free, "Active(file)": 1, "Inactive(file)": 2, "SReclaimable": 4, "Shmem": 9}
    lines = [f"Node {number} {name + ':':15} {size * 2**10} kB\n" for name, size in sizes.items()]
    (folder / "meminfo").write_text("".join(lines) + f"Node {number} HugePages_Total:     0\n")
    (folder / "cpulist").write_text(cpus + "\n")
    (folder / "distance").write_text(distances + "\n")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", [0]), ("0-3,8,10-11\n", [0, 1, 2, 3, 8, 10, 11]), ("", []), ("\n", []), ("63-64", [63, 64])],
)
def test_lists_as_linux_writes_them(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == numbers


def test_two_sockets(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0-3,8-11", 900, free=100)
    add_node(tmp_path, 10, "4-7,12-15", 800, free=50)
    found = read_topology(tmp_path, range(16))
    first = Node(0, (0, 1, 2, 3, 8, 9, 10, 11), 900 * MIB, 107 * MIB)
    assert found == Topology((first, Node(10, (4, 5, 6, 7, 12, 13, 14, 15), 800 * MIB, 57 * MIB)))
    assert found.available == (107 * MIB, 57 * MIB)


def test_a_process_has_the_nodes_of_the_processors_and_the_memory_that_it_may_use(tmp_path: Path) -> None:
    for number in range(3):
        add_node(tmp_path, number, f"{2 * number}-{2 * number + 1}", 100)
    assert [node.cpus for node in read_topology(tmp_path, [1, 4, 5]).nodes] == [(1,), (4, 5)]
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name: x\nMems_allowed:\t5\nMems_allowed_list:\t0,2\n")
    assert [node.number for node in read_topology(tmp_path, range(4)).nodes] == [0]
    assert [node.number for node in read_topology(tmp_path, range(6)).nodes] == [0, 2]


def test_processors_without_memory_count_to_the_nearest_node_that_has_both(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0-1", 100, distances="10 20 30 40")
    add_node(tmp_path, 1, "2-3", 0, distances="30 10 12 11")
    add_node(tmp_path, 2, "4-5", 100, distances="30 20 10 40")
    add_node(tmp_path, 3, "", 100, distances="11 11 11 10")  # as memory behind CXL
    nodes = read_topology(tmp_path, range(6)).nodes
    assert [(node.number, node.cpus) for node in nodes] == [(0, (0, 1)), (2, (4, 5, 2, 3))]


def test_a_machine_that_does_not_tell_is_one_node(tmp_path: Path) -> None:
    assert read_topology(tmp_path, [3, 1]) == Topology((Node(0, (1, 3), 0, 0),))
    add_node(tmp_path, 0, "0-1", 0)
    assert read_topology(tmp_path, [0, 1]) == Topology((Node(0, (0, 1), 0, 0),))


def test_this_machine_has_all_processors_of_this_process_once() -> None:
    found = read_topology()
    assert sorted(cpu for node in found.nodes for cpu in node.cpus) == allowed_cpus()
    assert all(node.available <= node.nbytes for node in found.nodes)
