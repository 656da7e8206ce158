"""`python -m src` prints the stages in their order."""

from __future__ import annotations

import ast
from pathlib import Path

STAGES = ("folds", "cache", "train", "evaluate", "export", "infer")
AROUND = ("prepare", "distil", "precision", "bundle", "timeline", "experiments", "demo")


def first_line(module: str) -> str:
    """A module's opening sentence, read without importing it."""
    source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


if __name__ == "__main__":
    print("The stages, in their order (python -m src.<stage> --help lists a stage's settings):\n")
    for module in STAGES + AROUND:
        print(f"  python -m src.{module:11s} {first_line(module)}")
