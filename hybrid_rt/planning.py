"""From what a user asks for to a plan, and to the device that keeps to it."""

from collections.abc import Sequence

from hybrid_rt.loader import Source
from offload.backend import Backend, CpuBackend
from offload.emulate import EmulatedBackend, Ledger
from offload.hardware import choose_device
from offload.memory import check_lockable
from offload.plan import Device, Plan
from offload.topology import Topology
from offload.wishes import Wishes, plan_for
from quant.errors import DeviceError, Dsr1Error
from quant.inventory import TensorSpec
from quant.recipes import find_recipe
from quant.store import Store


def plan_model(source: Source, wishes: Wishes, notes: list[str], topology: Topology | None = None) -> Plan:
    """Where the parts of `source` go. Raises PlanError when they do not fit, DeviceError for a device there is not.

    topology: by default that of this machine.
    """

    def available(spec: TensorSpec) -> Sequence[str]:
        return source.representations(spec.name)

    plan = plan_for(wishes, source.inventory, available, notes, runnable_device, topology).plan
    if plan.device == "cuda":
        raise NO_CUDA
    check_lockable(plan.resident_bytes("locked"))
    return plan


NO_CUDA = DeviceError("this version does not run on CUDA yet; use --device cpu, or emulate to try a GPU's plan")


def runnable_device(asked: str, gpu_mem: int | None, notes: list[str]) -> tuple[Device, int]:
    """The device that `--device` means in this version, which has no CUDA yet, and the bytes of GPU memory to use."""
    if asked == "cuda":
        raise NO_CUDA
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
