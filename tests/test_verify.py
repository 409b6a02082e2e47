"""`dsr1 quantize --verify`."""

import json
import shutil
from pathlib import Path

import pytest

from cli.verify import verify
from quant.checkpoint import Checkpoint
from quant.convert import convert
from quant.errors import StoreError
from tests.tiny_checkpoint import NO_MTP, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    convert(Checkpoint.open(write_checkpoint(folder / "source", NO_MTP)), folder / "store", "fast")
    return folder / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def damage(path: Path) -> None:
    """Change the last byte, which no header tells of."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_whole_store(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(str(made))
    told = capsys.readouterr()
    assert not told.out and "all checksums are right" in told.err.splitlines()[-1]
    assert "layer-001.safetensors: at" in told.err  # its progress


def test_json(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify(str(made), as_json=True)
    files = {path.name: path.stat().st_size for path in made.iterdir() if path.name != "dsr1-store.json"}
    expected = {"store": str(made), "bytes": sum(files.values()), "files": sorted(files), "ok": True}
    assert json.loads(capsys.readouterr().out) == expected


def test_every_damaged_file_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(store / "layer-000.safetensors")
    damage(store / "top.safetensors")
    with pytest.raises(StoreError, match="again") as caught:
        verify(str(store), as_json=True)
    assert all(name in str(caught.value) for name in ("layer-000.safetensors", "top.safetensors"))
    assert "layer-001" not in str(caught.value) and not capsys.readouterr().out


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a store"):
        verify(str(tmp_path))
