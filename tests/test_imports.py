"""Folders import downwards only: the table in docs/architecture.md, imports for type checkers included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cadre

SOURCE = Path(__file__).parents[1] / "src" / "cadre"
MAY_IMPORT = {
    "cli": {"study", "train", "serve", "infer", "plan", "data", "hub", "model", "kernels"},
    "study": {"train", "infer", "plan", "data", "hub", "model", "kernels"},
    "train": {"plan", "data", "hub", "model", "kernels"},
    "serve": {"infer", "model"},
    "infer": {"plan", "hub", "model", "kernels"},
    "plan": {"model.config"},
    "data": {"hub"},
    "hub": {"model", "kernels"},
    "model": {"kernels"},
    "kernels": set(),
}
FOR_ALL = {"errors", "files", "html", "sections", "units"}


def imported(file: Path) -> set[str]:
    """Dotted names within `cadre` that a file imports, such as `model.config`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("cadre.") for name in names if name.startswith("cadre.")}


@pytest.mark.parametrize("folder", sorted(path.name for path in SOURCE.iterdir() if any(path.glob("**/*.py"))))
def test_a_folder_imports_only_those_below_it(folder):
    allowed = {folder, *MAY_IMPORT[folder], *FOR_ALL}
    for file in (SOURCE / folder).rglob("*.py"):
        for name in imported(file):
            assert any(f"{name}.".startswith(f"{below}.") for below in allowed), f"{file.relative_to(SOURCE)}: {name}"


def test_a_notebook_completes_what_the_package_offers():
    assert dir(cadre) == sorted(cadre.__all__)
