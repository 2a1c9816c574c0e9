"""The LLaDA backbone: a bidirectional Llama from transformers' blocks, in LLaDA's checkpoint format; LoRA.

    model = load_backbone(folder, dtype=torch.bfloat16)     # official GSAI-ML/LLaDA files, by tensor name
    hidden = encode(model, ids)                             # (B, L, d)
    logits = model.lm_head(hidden[mask])                    # only where they are needed
    save_backbone(model, folder)                            # the same format back, sharded where it is large

No remote code: LLaDA's blocks are Llama's without the causal mask. A tensor that is missing, left over or of another
shape is an error that names it. A backbone made on the spot (`new_backbone`) is saved and loaded the same way.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from treediff.config import UserError, whole

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from treediff.config import Config

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The 7 matrices of each block, never the head (A.1)."""

_NAMES = (  # official -> transformers; `N` is the block's number
    ("model.transformer.wte.weight", "model.embed_tokens.weight"),
    ("model.transformer.ln_f.weight", "model.norm.weight"),
    ("model.transformer.ff_out.weight", "lm_head.weight"),
    ("model.transformer.blocks.N.attn_norm.weight", "model.layers.N.input_layernorm.weight"),
    ("model.transformer.blocks.N.q_proj.weight", "model.layers.N.self_attn.q_proj.weight"),
    ("model.transformer.blocks.N.k_proj.weight", "model.layers.N.self_attn.k_proj.weight"),
    ("model.transformer.blocks.N.v_proj.weight", "model.layers.N.self_attn.v_proj.weight"),
    ("model.transformer.blocks.N.attn_out.weight", "model.layers.N.self_attn.o_proj.weight"),
    ("model.transformer.blocks.N.ff_norm.weight", "model.layers.N.post_attention_layernorm.weight"),
    ("model.transformer.blocks.N.ff_proj.weight", "model.layers.N.mlp.gate_proj.weight"),
    ("model.transformer.blocks.N.up_proj.weight", "model.layers.N.mlp.up_proj.weight"),
    ("model.transformer.blocks.N.ff_out.weight", "model.layers.N.mlp.down_proj.weight"),
)
_TO_OFFICIAL = {ours: official for official, ours in _NAMES}

# What a LLaDA config may say without changing the computation below.
_REQUIRED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "layer_norm_with_affine": True,
    "rope_full_precision": True,
    "block_group_size": 1,
}
_SHARD = 5_000_000_000  # bytes of a checkpoint's file, at most


_SHAPE = (  # what config.json must say
    "d_model",
    "n_layers",
    "n_heads",
    "mlp_hidden_size",
    "vocab_size",
    "max_sequence_length",
    "rms_norm_eps",
    "rope_theta",
)


def _kv_heads(config: dict[str, Any]) -> int:
    return config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else config["n_heads"])


def official_name(name: str) -> str:
    """A parameter's name in LLaDA's checkpoints."""
    block = re.search(r"\.layers\.(\d+)\.", name)
    if not block:
        return _TO_OFFICIAL[name]
    return _TO_OFFICIAL[name.replace(block[0], ".layers.N.")].replace(".N.", f".{block[1]}.")


def _empty(config: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of a LLaDA config's shape on the meta device: no memory, no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for key, value in _REQUIRED.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"backbone: {key} = {config[key]!r} is not supported, only {value!r}.")
    if missing := [k for k in _SHAPE if not config.get(k)]:
        raise UserError(f"backbone: its config.json has no {missing[0]}; is it a LLaDA checkpoint's?")
    if config["n_heads"] % _kv_heads(config) or config["d_model"] % config["n_heads"]:
        raise UserError(
            f"backbone: {config['n_heads']} heads cannot share {_kv_heads(config)} key and value heads, or do not "
            f"divide d_model {config['d_model']} (config.json)."
        )
    llama = LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=_kv_heads(config),
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config.get("weight_tying", False),
        use_cache=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=config.get("eos_token_id"),
    )
    llama.is_causal = False
    # SDPA's backward on a CPU takes twice the time of plain matmul and softmax; on a GPU it is the flash path.
    llama._attn_implementation = "sdpa" if torch.cuda.is_available() else "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(llama).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.llada_config = dict(config)
    return model


def _finish(model: LlamaForCausalLM, device: str) -> LlamaForCausalLM:
    """Rebuild what is computed rather than loaded (the rotary table, in float32), tie if asked."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def load_backbone(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", revision: str = "main"
) -> LlamaForCausalLM:
    """Read an official LLaDA checkpoint (a folder or a hub id; sharded or not), one tensor at a time, as `dtype`.

    Raises UserError naming any tensor that is missing, left over, of another shape or in a truncated file.
    """
    from safetensors import SafetensorError, safe_open

    folder = _folder(name, revision)
    model = _empty(_read(folder / "config.json"), dtype)
    wanted = {official_name(n): n for n, _ in model.named_parameters()}
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
    return _finish(model, device)


def _folder(name: str, revision: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as e:  # the hub client's errors have no common base; all mean that there is no checkpoint
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"backbone: {name} is neither a folder nor a reachable hub id ({reason}).") from None


def _read(path: Path) -> dict[str, Any]:
    from treediff.config import read_json

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


def new_backbone(cfg: Config, vocab_size: int, eos_id: int, mask_id: int) -> LlamaForCausalLM:
    """A backbone in LLaDA's shape with fresh weights, drawn from `cfg.seed`, in float32.

    Query and key start out alike, and the output projection close to the value's transpose: attention that begins by
    looking for equal tokens and handing on what it sees.
    """
    config = {
        "model_type": "llada",
        "d_model": cfg.d_model,
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_heads,
        "mlp_hidden_size": cfg.mlp_hidden,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "max_sequence_length": 4 * cfg.max_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "weight_tying": False,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "mask_token_id": mask_id,
        "torch_dtype": "float32",
        **_REQUIRED,
    }
    model = _finish(_empty(config, torch.float32).to_empty(device="cpu"), "cpu")
    draw = torch.Generator().manual_seed(cfg.seed)
    d = cfg.d_model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif "embed" in name:
                weight.normal_(0, 1, generator=draw)
            elif "lm_head" in name:
                weight.normal_(0, 0.02, generator=draw)
            else:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=draw)
        for layer in model.model.layers:
            attn = layer.self_attn
            noise = torch.randn(2, d, d, generator=draw) * (0.3 * d**-0.5)
            attn.k_proj.weight.copy_(attn.q_proj.weight + noise[0])
            attn.o_proj.weight.copy_(attn.v_proj.weight.T + noise[1])
    return model


def save_backbone(model: LlamaForCausalLM, folder: Path, tok: Any = None, most: int = _SHARD) -> None:
    """Write `model` (and its tokenizer) to `folder` in LLaDA's format, whole or not at all.

    One file, or several of at most `most` bytes with their index, as the hub has them.
    """
    from safetensors.torch import save_file

    named = [(official_name(n), p.detach()) for n, p in model.named_parameters()]
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in named:
        if shards[-1] and size + tensor.nbytes > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    dtype = str(model.dtype).removeprefix("torch.")
    with whole(folder) as spot:
        spot.mkdir()
        index = {}
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({k: t.contiguous().cpu() for k, t in shard.items()}, spot / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = {"total_size": sum(t.nbytes for _, t in named)}
            (spot / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
        (spot / "config.json").write_text(json.dumps({**model.llada_config, "torch_dtype": dtype}, indent=1) + "\n")
        if tok is not None:
            tok.save_pretrained(spot)


def add_lora(model: LlamaForCausalLM, cfg: Config) -> nn.Module:
    """`model` with trainable LoRA matrices on the 7 matrices of each block, everything else frozen (A.1).

    Raises UserError if one of the targets matches nothing.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(cfg.seed)  # the matrices' initialisation: the same for every masking
    lora = LoraConfig(
        r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, target_modules=list(LORA_TARGETS)
    )
    wrapped = get_peft_model(model, lora)
    matched = {n.split(".")[-4] for n, p in wrapped.named_parameters() if ".lora_A." in n and p.requires_grad}
    if matched != set(LORA_TARGETS):
        raise UserError(f"lora: no module matches {', '.join(sorted(set(LORA_TARGETS) - matched))}.")
    return wrapped


def load_adapter(model: LlamaForCausalLM, folder: Path) -> LlamaForCausalLM:
    """`model` with the PEFT adapter in `folder` merged into its weights."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: there is no PEFT adapter here.")
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is on its way out
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


def encode(model: nn.Module, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states (B, L, d) of token ids (B, L); `attention_mask` (B, L) is 0 at padding, None without any."""
    llama = model.get_base_model() if hasattr(model, "get_base_model") else model
    if attention_mask is not None:
        # transformers would look into the mask, which makes the host wait for the device; one of four axes it takes as
        # it is. It broadcasts over heads and queries, so that (B, 1, L, L) never exists.
        seen = attention_mask.bool()[:, None, None, :]
        if llama.config._attn_implementation == "eager":  # adds its mask to the scores
            dtype = llama.dtype
            seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        attention_mask = seen
    return llama.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state


def check_tokenizer(model: LlamaForCausalLM, tok: Any) -> None:
    """Raises UserError if the model cannot have been made with this tokenizer."""
    rows, config = model.get_input_embeddings().weight.shape[0], model.llada_config
    most = max(tok.get_vocab().values(), default=0)
    if most >= rows:
        raise UserError(f"tokenizer: its ids go up to {most}, the backbone's embedding has {rows} rows only.")
    for key, name in (("mask_token_id", "mask"), ("eos_token_id", "end-of-text")):
        mine, its = getattr(tok, key), config.get(key)
        if its is not None and its != mine:
            raise UserError(f"tokenizer: its {name} token is {mine}, the backbone's is {its}: it is another model's.")


def head(model: nn.Module) -> nn.Linear:
    """The projection from hidden states to logits."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).lm_head


class KeyValues:
    """Keys and values (B, heads, L, d_head) of every block for a canvas of L tokens.

    A pass over the whole canvas fills them; a later pass over a window of it rewrites the window's and sees the rest.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.window: slice | None = None  # None: the whole canvas

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What transformers' attention calls: the keys and values to attend to."""
        if self.window is None:
            self.layers[layer] = (keys, values)
        else:
            for kept, new in zip(self.layers[layer], (keys, values), strict=True):
                kept[:, :, self.window] = new
        return self.layers[layer]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows (int64) of the batch only."""
        self.layers = {i: (keys[rows], values[rows]) for i, (keys, values) in self.layers.items()}


def padding_bias(model: nn.Module, seen: torch.Tensor) -> torch.Tensor:
    """What is added to attention scores so that padding is not seen: (B, 1, 1, L) from `seen` (B, L), 0 at padding."""
    bias = torch.zeros(seen.shape, dtype=head(model).weight.dtype, device=seen.device)
    return bias.masked_fill(seen == 0, torch.finfo(bias.dtype).min)[:, None, None]


def encode_window(
    model: nn.Module, ids: torch.Tensor, first: int, bias: torch.Tensor | None, kept: KeyValues | None
) -> torch.Tensor:
    """Last hidden states (B, W, d) of the window `ids` (B, W) of a canvas, which begins at position `first`.

    Without `kept` the window is the whole canvas. `bias`: see `padding_bias`. For sampling: where `encode` builds its
    mask anew and reads it on the host, this only queues work on the device.
    """
    llama = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    hidden = llama.embed_tokens(ids)
    rotary = llama.rotary_emb(hidden, torch.arange(first, first + ids.shape[1], device=ids.device)[None])
    for layer in llama.layers:
        hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary, past_key_values=kept)
    return llama.norm(hidden)


def random_backbone(shape: dict[str, int], dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A backbone of a given shape with weights drawn on the device: for measuring speed, where their values are idle.

    `shape` gives d_model, n_layers, n_heads, mlp_hidden_size and vocab_size, as LLaDA's config.json calls them.
    """
    config = {**_REQUIRED, **shape, "max_sequence_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    model = _finish(_empty(config, dtype).to_empty(device=device), device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, weight.shape[1] ** -0.5)
    return model
