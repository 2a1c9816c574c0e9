"""Checkpoints: read by tensor name without remote code, written in the same format, whole or not at all.

    model = load_backbone(folder, dtype=torch.bfloat16)     # a folder or a hub id, one file or sharded
    save_backbone(model, folder, tok)

A tensor that is missing, left over, cut short or of another shape is an error that names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from treediff.errors import UserError
from treediff.files import read_json, whole
from treediff.model import backbones

if TYPE_CHECKING:
    from treediff.model.backbones import Model


_SHARD = 5_000_000_000  # bytes of a checkpoint's file, at most


def load_backbone(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", revision: str = "main") -> Model:
    """Read an official checkpoint (a folder or a hub id; sharded or not), one tensor at a time, as `dtype`.

    Raises UserError naming any tensor that is missing, left over, of another shape or in a truncated file.
    """
    from safetensors import SafetensorError, safe_open

    folder = fetch(name, revision)
    model = backbones.empty(_read(folder / "config.json"), dtype)
    wanted = {model.backbone.official_name(n): n for n, _ in model.named_parameters()}
    found: dict[str, Path] = {}
    for shard in _shards(folder):
        try:
            with safe_open(shard, "pt", device=device) as file:
                for tensor_name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    if tensor_name in found:
                        raise UserError(f"{shard}: tensor {tensor_name} is in {found[tensor_name].name} already.")
                    found[tensor_name] = shard
                    if tensor_name not in wanted:
                        raise UserError(f"{shard}: tensor {tensor_name} belongs to no part of this model.")
                    tensor = file.get_tensor(tensor_name)
                    _assign(model, wanted[tensor_name], tensor.to(dtype), shard, tensor_name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{shard}: damaged or cut short ({e}); fetch it again.") from None
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are).")
    return backbones.finish(model, device)


def fetch(name: str, revision: str) -> Path:
    """The folder of a checkpoint: `name` itself, or where the hub's is after its download. Raises UserError."""
    if Path(name).is_dir():
        return Path(name)
    backbones.refuse(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # the hub client's errors have no common base; all mean that there is no checkpoint
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"backbone: {name} is neither a folder nor a reachable hub id ({reason}).") from None


def _read(path: Path) -> dict[str, Any]:

    return read_json(path)


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        listed = _read(index)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict) or not listed["weight_map"]:
            raise UserError(f"{index}: lists no tensors under weight_map; fetch it again.")
        names = sorted({str(name) for name in listed["weight_map"].values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index}: {name} is not a file of this folder.")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: this file of the checkpoint is missing.")
    return [folder / name for name in names]


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, shard: Path, official: str) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    want = tuple(getattr(module, leaf).shape)
    if tuple(tensor.shape) != want:
        raise UserError(f"{shard}: tensor {official} has shape {tuple(tensor.shape)}, config.json says {want}.")
    setattr(module, leaf, nn.Parameter(tensor))


def save_backbone(model: Model, folder: Path, tok: Any = None, most: int = _SHARD, card: str = "") -> None:
    """Write `model`, its tokenizer and its `card` (README.md) to `folder` in its own family's format, or nothing.

    One file, or several of at most `most` bytes with their index, as the hub has them.
    """
    from huggingface_hub import save_torch_state_dict

    named = {model.backbone.official_name(n): p.detach() for n, p in model.named_parameters()}
    dtype = str(model.dtype).removeprefix("torch.")
    with whole(folder) as temporary:
        temporary.mkdir()
        save_torch_state_dict(named, temporary, max_shard_size=most)
        (temporary / "config.json").write_text(
            json.dumps({**model.official_config, "torch_dtype": dtype}, indent=1) + "\n"
        )
        if tok is not None:
            tok.save_pretrained(temporary)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def check_tokenizer(model: Model, tok: Any) -> None:
    """Raises UserError if the model cannot have been made with this tokenizer."""
    rows, config = model.get_input_embeddings().weight.shape[0], model.official_config
    most = max(tok.get_vocab().values(), default=0)
    if most >= rows:
        raise UserError(f"tokenizer: its ids go up to {most}, the backbone's embedding has {rows} rows only.")
    for key, name in (("mask_token_id", "mask"), ("eos_token_id", "end-of-text")):
        found, wanted = getattr(tok, key), config.get(key)
        if wanted is not None and wanted != found:
            raise UserError(f"tokenizer: its {name} token is {found}, the backbone's {wanted}: it is another model's.")
