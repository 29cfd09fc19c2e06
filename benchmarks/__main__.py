"""Run comparisons by name, each in a process of its own, and turn their results into the documents.

    uv run --group benchmarks python -m benchmarks                                    # what there is
    uv run --group benchmarks python -m benchmarks peers hvl_cost                     # some of it
    uv run --group benchmarks python -m benchmarks all --packs ../shared/data --work ~/.cache/ood-benchmarks

Results go to benchmarks/results/*.json with hardware and versions, from there into docs/benchmarks.md. What runs on
real images needs --packs; long runs are kept in --work and go on where they stopped.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPEED = (
    *("topk_patch_softmax", "iim_training_step", "setar_search", "hvl_cost", "expert_dispatch", "mofe_training_step"),
    *("peers", "extraction"),
)
GENERATED = ("iim_localisation", "hvl_boundary")
PACKS = ("tiny_imagenet_100", "bfloat16")
TRAINED = ("iim", "setar", "hvl", "mofe", "together")  # on the packs, resumable
ALL = (*SPEED, *GENERATED, *PACKS, *TRAINED)


def about(name: str) -> str:
    """First line of a script's description."""
    return (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or "").splitlines()[0]


def command(name: str, packs: Path | None, work: Path | None) -> list[str]:
    found = [sys.executable, str(HERE / f"{name}.py")]
    if name in (*PACKS, *TRAINED):
        found += ["--packs", str(packs)]
    return [*found, "--work", str(work / name)] if name in TRAINED and work else found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*ALL, "all", []], metavar="NAME", help="none lists them")
    parser.add_argument("--packs", type=Path, help="folder with the parquet packs")
    parser.add_argument("--work", type=Path, help="folder that keeps long runs")
    args = parser.parse_args()
    if not args.names:
        print("\n".join(f"{name:20s} {about(name)}" for name in ALL))
        return 0
    names = ALL if "all" in args.names else args.names
    if not args.packs and (needy := [name for name in names if name in (*PACKS, *TRAINED)]):
        parser.error(f"{', '.join(needy)} run on real images: pass --packs FOLDER, the folder with the parquet packs.")
    if not args.work and (long := [name for name in names if name in TRAINED]):
        parser.error(f"{', '.join(long)} take long: pass --work FOLDER, which keeps their runs.")
    failed = [name for name in names if not run(name, command(name, args.packs, args.work))]
    subprocess.run([sys.executable, str(HERE.parent / "tools" / "make_docs.py")], check=True)
    if failed:
        print(f"Failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, argv: list[str]) -> bool:
    """Whether a comparison went through; the others go on if not."""
    print(f"=== {name}", flush=True)
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=HERE, check=False)
    print(f"=== {name}: {(time.perf_counter() - started) / 60:.1f} minutes, exit status {done.returncode}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
