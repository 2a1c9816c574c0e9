"""Packs the wheels that a GPU machine without a network lacks: benchmarks/wheels.py [--have LIST] [--python X.Y]

Such a machine has torch and its CUDA libraries, often older than ours, and neither DeepSpeed nor the pinned
transformers. `--have` is its `pip freeze`; without one, the packages of CUDA's own stack (torch, triton, NVIDIA's) are
taken to be there and everything else of docker/cuda.lock that training and sampling import is packed. They must stay
below 64 MB together; `--python` is the machine's version. On that machine: pip install --no-index --no-deps --upgrade
--target SITE build/wheels/*.whl, then PYTHONPATH=SITE:. python3 benchmarks/gpu.py
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
    *("huggingface-hub", "safetensors", "regex", "tqdm", "packaging", "pytest", "datasets", "dill", "multiprocess"),
    *("iniconfig", "pluggy", "hypothesis", "sortedcontainers", "httpx", "httpx2", "httpcore", "httpcore2", "h11"),
    *("anyio", "idna", "certifi", "hf-xet", "filelock", "fsspec", "pyyaml", "typer", "shellingham", "click", "rich"),
)
"""What `make gpu` imports besides torch, by package; those that no lock names are left out."""
SOURCE = ("deepspeed", "hjson")
"""Those that PyPI has as source only; they need no compiler."""
LIMIT = 64_000_000  # bytes


def pins(path: Path) -> dict[str, str]:
    """Version by package of a lock or of `pip freeze`."""
    lines = (re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line.strip()) for line in path.read_text().splitlines())
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in lines if m}


def lacking(have: dict[str, str]) -> list[str]:
    """The pins of our lock that the machine has not, or has in another version."""
    lock = pins(ROOT / "docker" / "cuda.lock")
    needed = (*NEEDED, *(name for name in lock if name.startswith("tree-sitter")))
    return [f"{name}=={lock[name]}" for name in needed if name in lock and have.get(name) != lock[name]]


def pack(wanted: list[str], python: str, out: Path) -> None:
    """Wheels of the wanted packages in `out`, for that Python on x86-64 Linux; those without any are built here."""
    pip = [sys.executable, "-m", "pip"]
    built = [w for w in wanted if w.split("==")[0] in SOURCE]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), *built], check=True)
    ready = [
        *pip,
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
        "-d",
        str(out),
    ]
    ready += [f"--platform=manylinux{n}_x86_64" for n in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1")]
    ready += ["--platform=any", "--implementation=cp", *(w for w in wanted if w not in built)]
    subprocess.run(ready, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--have", type=Path, help="the machine's `pip freeze`")
    here = ".".join(map(str, sys.version_info[:2]))
    parser.add_argument("--python", default=here, help=f"the machine's Python; here {here}")
    parser.add_argument("--out", type=Path, default=Path("build/wheels"))
    args = parser.parse_args()
    wanted = lacking(pins(args.have) if args.have else {})
    args.out.mkdir(parents=True, exist_ok=True)
    pack(wanted, args.python, args.out)
    size = sum(path.stat().st_size for path in args.out.glob("*.whl"))
    print(f"{args.out}: {len(wanted)} packages, {size / 1e6:.1f} MB")
    if size > LIMIT:
        sys.exit(
            f"wheels: {size / 1e6:.1f} MB are more than {LIMIT / 1e6:.0f} MB; give the machine's list with --have."
        )


if __name__ == "__main__":
    main()
