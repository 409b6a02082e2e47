"""From what a user asks for to a plan, and to the device that keeps to it."""

from collections.abc import Sequence

from hybrid_rt.loader import Source
from offload.backend import Backend, CpuBackend
from offload.emulate import EmulatedBackend, Ledger
from offload.hardware import choose_device, usable_ram
from offload.memory import check_lockable
from offload.plan import Device, Plan
from offload.planner import Budget, choose_context, choose_residency, make_plan
from offload.sizes import parse_size
from offload.topology import Topology, read_topology
from quant.errors import DeviceError, Dsr1Error
from quant.inventory import TensorSpec
from quant.recipes import find_recipe
from quant.store import Store


def plan_model(
    source: Source,
    gpu_mem: str | int | None,
    ram: str | int | None,
    context: int | None,
    device: str,
    dtype: str,
    notes: list[str],
    residency: str | None = None,
    topology: Topology | None = None,
) -> Plan:
    """Where the parts of `source` go. Raises PlanError when they do not fit, DeviceError for a device there is not.

    residency: of routed experts, chosen by default. topology: by default that of this machine.
    """

    def available(spec: TensorSpec) -> Sequence[str]:
        return source.representations(spec.name)

    chosen, gpu_bytes = runnable_device(device, None if gpu_mem is None else parse_size(gpu_mem), notes)
    nodes = (topology or read_topology()).available
    budget = Budget(
        device=chosen,
        gpu_mem=gpu_bytes,
        ram=usable_ram() if ram is None else parse_size(ram),
        context=choose_context(context, source.config.max_seq_len, notes),
        dtype=dtype,
        residency=choose_residency(residency, source.inventory, available, nodes, notes),
        nodes=len(nodes),
    )
    plan = make_plan(source.inventory, available, budget, notes)
    check_lockable(plan.resident_bytes("locked"))
    return plan


def runnable_device(asked: str, gpu_mem: int | None, notes: list[str]) -> tuple[Device, int]:
    """The device that `--device` means in this version, which has no CUDA yet, and the bytes of GPU memory to use."""
    if asked == "cuda":
        raise DeviceError("this version does not run on CUDA yet; use --device cpu, or emulate to try a GPU's plan")
    return choose_device("cpu" if asked == "auto" else asked, gpu_mem, notes)


def make_backend(plan: Plan) -> Backend:
    """The device of a plan, with nothing on it yet."""
    if plan.device == "cpu":
        return CpuBackend()
    return EmulatedBackend(Ledger(plan.gpu_budget - plan.reserve_bytes))


def check_recipe(source: Source, recipe: str | None) -> None:
    """Refuse a recipe that the model was not stored with."""
    if recipe is None:
        return
    if not isinstance(source, Store):
        raise Dsr1Error(
            f"{source.folder} is a published checkpoint and runs as it is; make a store of it with "
            f"`dsr1 quantize {source.folder} STORE --recipe {recipe}` and run that"
        )
    if source.recipe != find_recipe(recipe).name:
        raise Dsr1Error(f"{source.folder} was made with the recipe {source.recipe}, not {recipe}; leave --recipe out")
