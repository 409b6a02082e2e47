"""The report beside a store: its figures against the store itself, and what is shown of it."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cli.plan import plan
from cli.report import show_report
from offload.wishes import Wishes
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.kernels import set_threads
from quant.progress import Progress
from quant.report import REPORT_NAME, Report, read_report
from quant.store import Store
from tests.test_quantize import tree
from tests.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    convert(Checkpoint.open(write_checkpoint(folder / "source")), folder / "store", "accurate")
    return folder


def report_of(made: Path) -> Report:
    report = read_report(made / "store")
    assert report is not None
    return report


def test_errors_are_those_of_the_store(made: Path) -> None:
    source, store, report = Checkpoint.open(made / "source"), Store.open(made / "store"), report_of(made)
    assert report.recipe == "accurate" and report.calibration is None
    listed = {(line.name, line.format) for line in report.tensors}
    stored = {(name, fmt) for name in store.inventory.by_name for fmt in store.representations(name)}
    assert listed == {(name, fmt) for name, fmt in stored if fmt not in ("f32", "bf16")}
    for line in report.tensors:
        expected = source.weight(line.name).dequantize(torch.float32).double()
        weight = store.weight(line.name, line.format)
        error = (weight.dequantize(torch.float32) - expected).square().sum() / expected.square().sum()
        assert line.nmse == pytest.approx(error.item(), rel=1e-3) and line.weighted_nmse is None
        assert (line.nbytes, line.weights) == (weight.nbytes, expected.numel())
    worst = [line.nmse or 0 for line in report.tensors]
    assert worst == sorted(worst, reverse=True)


def test_components_add_up(made: Path) -> None:
    report = report_of(made)
    for field in ("nbytes", "weights"):
        totals = [sum(getattr(line, field) for line in lines) for lines in (report.components, report.tensors)]
        assert totals[0] == totals[1]
    kinds = {(line.name, line.format) for line in report.components}
    assert {("experts gate_up", "accurate"), ("experts down", "q8"), ("kv_b", "accurate"), ("mtp", "q8")} <= kinds
    fields = json.loads((made / "store" / REPORT_NAME).read_bytes())
    assert fields["components"][0]["bits_per_weight"] > 4


def test_it_is_shown_after_a_conversion_and_with_a_plan(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(str(made / "store"), Wishes(device="cpu", ram="1G", context=64))
    out = capsys.readouterr().out
    assert "experts gate_up" in out and "bits a weight" in out and "Most is lost of layers." in out
    show_report(made / "source", Console())
    assert not capsys.readouterr().out


def stop_here(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("one_kernel_thread")
@pytest.mark.parametrize("share", [0.2, 0.7, None])
def test_it_does_not_tell_who_wrote_what(made: Path, tmp_path: Path, share: float | None) -> None:
    """Stopped at a share of the work, or before the manifest, and continued by another number of threads."""

    def stop(step: Progress) -> None:
        if share is not None and step.done > share * step.total:
            stop_here()

    source = Checkpoint.open(made / "source")
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        if share is None:
            patch.setattr("quant.convert.Manifest", stop_here)
        convert(source, tmp_path / "store", "accurate", stop)
    set_threads(3)
    convert(source, tmp_path / "store", "accurate")
    assert tree(tmp_path / "store") == tree(made / "store")


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"format": "dsr1-report", "version": 2}', '{"format": "dsr1-report", "version": 1}']
)
def test_a_report_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT_NAME).write_text(text)
    assert read_report(tmp_path) is None
