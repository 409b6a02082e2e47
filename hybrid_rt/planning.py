"""From what a user asks for to a plan, and to the device that keeps to it."""

from collections.abc import Sequence

import torch

from hybrid_rt.gpu_attention import graphs_serve
from hybrid_rt.loader import Source
from offload.backend import Backend, CpuBackend
from offload.cuda_backend import CudaBackend, CudaGrapher
from offload.emulate import EmulatedBackend, Ledger
from offload.graphs import GraphingBackend
from offload.hardware import choose_device
from offload.memory import check_lockable
from offload.plan import Device, Plan
from offload.topology import Topology
from offload.wishes import Wishes, plan_for
from quant.config import ModelConfig
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
    check_lockable(plan.resident_bytes("locked"))
    return plan


def runnable_device(asked: str, gpu_mem: int | None, notes: list[str]) -> tuple[Device, int]:
    """The device that `--device` means, and the bytes of GPU memory to use.

    "auto" is the CPU as long as CUDA has not run on hardware: who wants to try it says so.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"torch {torch.__version__} finds no CUDA device here; install NVIDIA's driver and torch's build for CUDA, "
            "or use --device cpu, or emulate to try a GPU's plan"
        )
    if asked == "auto" and torch.cuda.is_available():
        notes.append("a GPU is there and not used: CUDA has not run on hardware yet; --device cuda tries it")
    return choose_device("cpu" if asked == "auto" else asked, gpu_mem, notes)


def make_backend(plan: Plan, config: ModelConfig) -> Backend:
    """The device of a plan, with nothing on it yet."""
    if plan.device == "cpu":
        return CpuBackend()
    budget = plan.gpu_budget - plan.reserve_bytes
    if plan.device == "emulate":
        return EmulatedBackend(Ledger(budget))
    backend = CudaBackend(budget)
    if not graphs_serve(config, plan.representation(0, "kv_b")):
        return backend
    return GraphingBackend(backend, CudaGrapher(backend))


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
