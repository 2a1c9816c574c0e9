"""How logits.safetensors was made: the official model's logits and hidden states on fixed ids, float32, on a CPU.

    pip install transformers==4.46.3 torch
    python tests/golden/make_llada.py LLADA_FOLDER [--out FILE]

LLADA_FOLDER holds modeling_llada.py and configuration_llada.py of GSAI-ML/LLaDA-8B-Instruct (that code is not part of
this project; it needs a transformers of its time). The checkpoint beside this file has its tensor names, and weights
drawn at random. Cases and ids are those of the file that is there; without --out what comes out is compared with it.
`hidden_i` is the input of block i, the last one the output of the final norm.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "llada" / "tiny"


def official(code: Path) -> torch.nn.Module:
    """The official model with the golden checkpoint's weights. Its own code is run: only from a folder you trust."""
    from transformers import AutoModel

    with tempfile.TemporaryDirectory() as folder:
        for path in [*HERE.joinpath("checkpoint").iterdir(), *code.glob("*.py")]:
            shutil.copy(path, folder)
        return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("code", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept, made = load_file(HERE / "logits.safetensors"), {}
    model = official(args.code)
    for name in sorted(k.removesuffix(".input_ids") for k in kept if k.endswith(".input_ids")):
        ids = kept[f"{name}.input_ids"]
        mask = kept.get(f"{name}.attention_mask")
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        made[f"{name}.logits" if mask is None else f"{name}.logits_2025_10"] = out.logits
        if mask is None:
            made |= {f"{name}.hidden_{i}": h for i, h in enumerate(out.hidden_states)}
    if args.out:
        inputs = {k: v for k, v in kept.items() if k.endswith(("input_ids", "attention_mask"))}
        save_file(
            {**inputs, **made}, args.out, metadata={"note": "float32 CPU logits of official LLaDA modelling file"}
        )
        return
    worst = max((made[k].float() - kept[k]).abs().max().item() for k in made.keys() & kept.keys())
    print(f"{len(made.keys() & kept.keys())} tensors, largest difference {worst:.2e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
