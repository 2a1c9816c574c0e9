"""Packs the wheels that a GPU machine without a network lacks: python benchmarks/wheels.py [--have LIST] [--out FOLDER]

Such a machine has torch and its CUDA libraries, often older than ours, and neither DeepSpeed nor the pinned
transformers. `--have` is its `pip freeze`; without one, the packages of CUDA's own stack (torch, triton, NVIDIA's) are
taken to be there and everything else of docker/cuda.lock that training and sampling import is packed. They must stay
below 64 MB together. On that machine: python -m venv --system-site-packages .venv-gpu, then
.venv-gpu/bin/pip install --no-index --no-deps FOLDER/*.whl
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    *("transformers", "tokenizers", "peft", "accelerate", "deepspeed", "hjson", "py-cpuinfo", "einops", "msgpack"),
    *("ninja", "psutil", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("huggingface-hub", "safetensors", "regex", "tree-sitter", "tree-sitter-python", "tqdm", "packaging", "pytest"),
    *("iniconfig", "pluggy", "hypothesis", "sortedcontainers", "httpx", "httpx2", "httpcore", "httpcore2", "h11"),
    *("anyio", "idna", "certifi", "hf-xet", "filelock", "fsspec", "pyyaml", "typer", "shellingham", "click", "rich"),
)
"""What `make gpu` imports besides torch, by package; those that no lock names are left out."""
LIMIT = 64_000_000  # bytes


def pins(path: Path) -> dict[str, str]:
    """Version by package of a lock or of `pip freeze`."""
    lines = (re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line.strip()) for line in path.read_text().splitlines())
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in lines if m}


def lacking(have: dict[str, str]) -> list[str]:
    """The pins of our lock that the machine has not, or has in another version."""
    lock = pins(ROOT / "docker" / "cuda.lock")
    return [f"{name}=={lock[name]}" for name in NEEDED if name in lock and have.get(name) != lock[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--have", type=Path, help="the machine's `pip freeze`")
    parser.add_argument("--out", type=Path, default=Path("build/wheels"))
    args = parser.parse_args()
    wanted = lacking(pins(args.have) if args.have else {})
    args.out.mkdir(parents=True, exist_ok=True)
    # DeepSpeed is built from its source package, without a compiler.
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(args.out), *wanted]
    subprocess.run(pip, check=True)
    size = sum(path.stat().st_size for path in args.out.glob("*.whl"))
    print(f"{args.out}: {len(wanted)} packages, {size / 1e6:.1f} MB")
    if size > LIMIT:
        sys.exit(
            f"wheels: {size / 1e6:.1f} MB are more than {LIMIT / 1e6:.0f} MB; give the machine's list with --have."
        )


if __name__ == "__main__":
    main()
