"""From what a user asks for to what a plan is made from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offload.deferral import choose_deferred
from offload.expert_places import Usage
from offload.hardware import RAM_RESERVE, RAM_RESERVE_SHARE, choose_device, usable_ram
from offload.machine import Machine
from offload.parts import Available, Budget
from offload.pins import parse_pins
from offload.plan import Device, Plan
from offload.plan_file import read_plan
from offload.planner import Planning, choose_context, choose_residency, make_plan
from offload.sizes import parse_size
from offload.this_machine import machine_for
from offload.topology import Topology, read_topology
from quant.config import ModelConfig
from quant.errors import Dsr1Error
from quant.inventory import Inventory

ChooseDevice = Callable[[str, int | None, list[str]], tuple[Device, int]]


@dataclass(frozen=True)
class Wishes:
    """What a user asked of a plan; None where the default is wanted.

    gpu_mem, ram: as "24G", or bytes. pins: as "experts:3-5=gpu". hardware: a shipped machine's name, or a file.
    profile: a file that tells how often experts are used. plan: a file that `dsr1 plan --save` wrote. defer_experts:
    how many of a token's experts join one layer later.
    """

    gpu_mem: str | int | None = None
    ram: str | int | None = None
    context: int | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    residency: str | None = None
    pins: tuple[str, ...] = ()
    hardware: str | None = None
    profile: str | None = None
    plan: str | None = None
    defer_experts: int | None = None


@dataclass(frozen=True)
class Made:
    """A plan and what it was made from."""

    plan: Plan
    planning: Planning


def plan_for(
    wishes: Wishes,
    inventory: Inventory,
    available: Available,
    notes: list[str],
    choose: ChooseDevice = choose_device,
    topology: Topology | None = None,
) -> Made:
    """The plan that the wishes ask for. Raises PlanError when nothing fits, Dsr1Error for wishes that cannot be."""
    saved = None if wishes.plan is None else read_plan(Path(wishes.plan))
    planning = planning_for(
        wishes if saved is None else saved.completed(wishes), inventory, available, notes, choose, topology
    )
    return Made(make_plan(planning) if saved is None else saved.reused(planning), planning)


def planning_for(
    wishes: Wishes,
    inventory: Inventory,
    available: Available,
    notes: list[str],
    choose: ChooseDevice = choose_device,
    topology: Topology | None = None,
) -> Planning:
    """What a plan is made from. topology: by default that of this machine."""
    machine = machine_for(wishes.hardware)
    gpu_mem = None if wishes.gpu_mem is None else _size("--gpu-mem", wishes.gpu_mem)
    if wishes.hardware is not None and gpu_mem is None and wishes.device != "cpu" and machine.gpu is not None:
        gpu_mem = machine.gpu.memory
    device, gpu_bytes = choose(wishes.device, gpu_mem, notes)
    nodes = _node_bytes(wishes, machine, topology)
    budget = Budget(
        device=device,
        gpu_mem=gpu_bytes,
        ram=_ram(wishes, machine),
        context=choose_context(wishes.context, inventory.config.max_seq_len, notes),
        dtype=wishes.dtype,
        residency=choose_residency(wishes.residency, inventory, available, nodes, notes),
        nodes=len(nodes),
        deferred_experts=choose_deferred(wishes.defer_experts, inventory.config, notes, device != "cpu"),
    )
    return Planning(
        inventory,
        available,
        budget,
        machine,
        pins=parse_pins(wishes.pins),
        usage=None if wishes.profile is None else Usage.read(Path(wishes.profile), inventory),
        notes=tuple(notes),
        model=fingerprint(inventory.config),
    )


def fingerprint(config: ModelConfig) -> str:
    """A name for a model's shape: plans for one model are refused by another."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:16]


def _ram(wishes: Wishes, machine: Machine) -> int:
    if wishes.ram is not None:
        return _size("--ram", wishes.ram)
    if wishes.hardware is not None:
        return int(machine.ram - RAM_RESERVE - RAM_RESERVE_SHARE * machine.ram)
    return usable_ram()


def _size(option: str, size: str | int) -> int:
    """Bytes above 0. Raises Dsr1Error for anything else."""
    count = parse_size(size)
    if count <= 0:
        raise Dsr1Error(f"{option} is {size}; give a size above 0, as in 24G")
    return count


def _node_bytes(wishes: Wishes, machine: Machine, topology: Topology | None) -> tuple[int, ...]:
    """What each NUMA node has left."""
    if wishes.hardware is not None:
        return (machine.ram // machine.nodes,) * machine.nodes
    return (topology or read_topology()).available
