"""Print the versions that the workspace is developed with, as pip constraints."""

import tomllib
from pathlib import Path

root = Path(__file__).resolve().parents[1]
print("\n".join(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]))
