"""Who may import whom: the contracts of import-linter in pyproject.toml, and that they bite."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def lint_imports(folder: pathlib.Path) -> tuple[int, str]:
    """Returns the exit code and the output of `lint-imports` for the package in a folder."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    command = [sys.executable, "-c", program, "--no-cache"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def test_contracts_are_kept():
    code, output = lint_imports(ROOT)
    assert code == 0, output


@pytest.mark.parametrize(
    ("file", "imported"),
    [
        ("losses/base.py", "cskd_jax.training.step"),
        ("models/outputs.py", "cskd_jax.losses.base"),
        ("training/step.py", "cskd_jax.runs.schema"),
        ("runs/schema.py", "cskd_jax.commands.command_line"),
        ("data/types.py", "cskd_jax.console"),
        ("configs/methods.py", "cskd_jax.losses"),
        ("configs/methods.py", "jax"),
    ],
)
def test_planted_imports_are_found(file, imported, tmp_path):
    shutil.copytree(ROOT / "cskd_jax", tmp_path / "cskd_jax", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / "cskd_jax" / file, "a", encoding="utf-8") as stream:
        stream.write(f"\n\ndef planted():\n    import {imported}\n")
    code, output = lint_imports(tmp_path)
    assert code == 1
    planted = f"cskd_jax.{file.removesuffix('.py').replace('/', '.')} -> {imported}"
    assert planted in output
