"""`--calibrate` and `--imatrix` of `dsr1 quantize`: what tells how much each column counts."""

from pathlib import Path

from cli.escape import say
from hybrid_rt.calibration import Calibration, memory_bytes
from hybrid_rt.evaluate.text import read_text
from offload.hardware import usable_ram
from offload.sizes import format_size
from quant.checkpoint import Checkpoint
from quant.errors import StoreError, UsageError
from quant.imatrix import Imatrix
from quant.importance import AllAlike, Importance
from quant.kernels.ahead import PLAIN_KERNELS, compile_ahead
from quant.progress import Notes, unnoted


def find_importance(
    source: Checkpoint, calibrate: Path | None, imatrix: Path | None, report: Notes = unnoted
) -> Importance:
    """What the user asked for. report: is told what of a calibration runs.

    Raises UsageError for both, Dsr1Error for a file that is no use or too little memory."""
    if calibrate is not None and imatrix is not None:
        raise UsageError("--calibrate and --imatrix cannot be given together; leave one out")
    if imatrix is not None:
        return Imatrix(imatrix.expanduser())
    if calibrate is None:
        return AllAlike()
    path = calibrate.expanduser()
    text = read_text(path)
    made = Calibration(source, path, text, report)
    needed, free = memory_bytes(source.config, made.tokens), usable_ram()
    if needed > free:
        raise StoreError(
            f"calibrating with {made.tokens} tokens takes up to {format_size(needed)}, and {format_size(free)} "
            "are free; give a shorter text, or free memory"
        )
    compile_ahead(PLAIN_KERNELS)
    say(f"calibrating with {made.tokens} tokens of {path}, in up to {format_size(needed)} of memory")
    return made
