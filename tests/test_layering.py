"""Imports run one way, and light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("quant", "offload", "hybrid_rt", "cli")  # each may import itself and what stands before it


def imported_packages(path: Path) -> set[str]:
    """First parts of the names that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name of what is imported"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_run_one_way(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"benchmarks", "tests", "tools"}
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & above, path


COMMANDS = ("run", "chat", "quantize", "plan", "doctor", "bench", "eval")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_light_commands_import_no_heavy_package(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['dsr1', *{arguments!r}]\n"
        "from cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as left:\n    assert not left.code, left.code\n"
        "heavy = {'torch', 'numba', 'numpy', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dsr1" in done.stdout
