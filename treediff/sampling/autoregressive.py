"""Autoregressive models through the same prompts, extraction and files: Table 1's upper half, measured.

    treediff sample --model codellama/CodeLlama-7b-Instruct-hf --preset paper      # any causal LM of transformers
    treediff score  --model codellama/CodeLlama-7b-Instruct-hf --preset paper

Samples and scores lie in runs/<preset>/model-<name>-seed<k>/. `lengths` bounds the answer as it does for diffusion, the
switches of denoising do not matter, and the prompt is put into the model's own chat template, if it has one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from treediff.config import Config
from treediff.errors import UserError
from treediff.sampling import diffusion, prompts
from treediff.sampling.decode import Watch


class Autoregressive:
    """A causal language model as it answers prompts: greedily, or by its softmax at `temperature`."""

    def __init__(self, cfg: Config, length: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.cfg, self.length = cfg, length
        dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
        try:
            self.tok = AutoTokenizer.from_pretrained(cfg.model, padding_side="left", trust_remote_code=False)
            net: Any = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=dtype, trust_remote_code=False)
            self.net = net.to(diffusion.device()).eval()
        except (OSError, ValueError, KeyError) as e:
            if "trust_remote_code" in str(e):
                raise UserError(
                    f"model: {cfg.model} can be loaded by code of its own only, which is never run here; name a model "
                    "that transformers knows."
                ) from None
            reason = str(e).strip().splitlines()[0]
            raise UserError(f"model: {cfg.model} is no causal language model that can be loaded ({reason}).") from None
        own = self.net.generation_config.eos_token_id
        ends = {*(own if isinstance(own, list) else [own]), self.tok.eos_token_id} - {None}
        self.ends = sorted(ends)
        self.pad = self.tok.pad_token_id if self.tok.pad_token_id is not None else self.ends[0] if self.ends else 0

    def of_length(self, length: int) -> None:
        """Answer with at most `length` tokens from now on."""
        self.length = length

    def prompt(self, problem: str) -> tuple[list[int], str]:
        """A problem as token ids in the model's own chat template, and how the answer is made to begin."""
        said, begin = prompts.message(self.cfg, problem)
        if self.tok.chat_template:
            turn = [{"role": "user", "content": said}]
            text = str(self.tok.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)) + begin
            return self.tok(text, add_special_tokens=False).input_ids, begin
        return self.tok(f"{said}\n{begin}").input_ids, begin

    def rows(self, longest: int) -> int:
        """Prompts that fit together: no limit but `sample_batch`, which is halved where memory is short."""
        return sys.maxsize  # bounded by `sample_batch`, and halved where memory is short

    @torch.no_grad()
    def answer(self, batch: Sequence[prompts.Prompt], watch: Watch) -> list[dict[str, Any]]:
        """Per prompt: the answer's text, its ids, and for each the step that wrote it, which is its place."""
        warm = self.cfg.temperature > 0
        out = []
        for group in [[p] for p in batch] if warm else [batch]:  # drawn one by one: apart from who else is there
            width = max(len(p.ids) for p in group)
            ids = torch.tensor([[self.pad] * (width - len(p.ids)) + p.ids for p in group], device=self.net.device)
            seen = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in group], device=self.net.device)
            torch.manual_seed(self.cfg.seed * 2**36 + group[0].uid)
            written = self.net.generate(
                input_ids=ids,
                attention_mask=seen,
                max_new_tokens=self.length,
                do_sample=warm,
                temperature=self.cfg.temperature if warm else None,
                top_p=None,
                top_k=0 if warm else None,
                eos_token_id=self.ends or None,
                pad_token_id=self.pad,
            )[:, width:]
            out += [self._record(row) for row in written.tolist()]
            watch(written, len(out) / len(batch))
        return out

    def _record(self, ids: list[int]) -> dict[str, Any]:
        end = next((i for i, token in enumerate(ids) if token in self.ends), len(ids))
        text = self.tok.decode(ids[:end], skip_special_tokens=True)
        return {"text": text, "ids": ids[:end], "committed_at": list(range(end)), "confidence": []}
