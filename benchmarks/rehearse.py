"""The paper's run, rehearsed on a CPU: python benchmarks/rehearse.py [--short] [--keep FOLDER]

    make rehearse

Makes a checkpoint of LLaDA's own config at small width (vocabulary, token ids, all 269 special tokens, chat template,
six shards), rows in OpenCodeReasoning's columns and two benchmarks, puts them on a stand-in hub on loopback, and gives
the commands of a user to `--preset paper`: plan, prepare, train, sample and score each strategy, report, export. Width,
rows and steps are smaller, and so are the processes, for a machine of two cores; nothing else is changed. Then the same
from local folders with the hub out of reach. Commands run on a terminal of their own. It ends with an error at the
first prompt, the first warning, a file that is downloaded twice, or one that lies outside the runs folder and HF_HOME.
`--short` takes one strategy and one short answer, from the hub alone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import http.server
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from treediff.strategies import MASKINGS

MODEL, DATA = "GSAI-ML/LLaDA-8B-Instruct", "nvidia/OpenCodeReasoning"
WIDTH = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 192}
CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
"""LLaDA-8B-Instruct's config.json but for its width."""
FIRST_SPECIAL = 126080


def special_tokens() -> list[str]:
    """LLaDA's 269 special tokens, from id 126080 on."""
    reserved = [f"<|reserved_token_{i}|>" for i in range(256)]
    reserved[252] = "<|mdm_mask|>"
    last = ["<role>", "</role>", "<|arithmetic_start|>", "<|arithmetic_end|>", "<|number_start|>", "<|number_end|>"]
    turn = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", *reserved, *last, *turn]


# --- what lies on the hub ------------------------------------------------------------------------------------------
def make_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE with LLaDA's ids: a few merges that are in use, fillers up to 126,080, the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from treediff.masking.tokens import CHAT_TEMPLATE

    pieces = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = cut
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    small.train_from_iterator(texts, trainer)
    known = json.loads(small.to_str())["model"]
    vocabulary = dict(known["vocab"])
    for number in range(len(vocabulary), FIRST_SPECIAL):
        vocabulary[f"Ġfiller{number}"] = number
    special = special_tokens()
    vocabulary |= {token: FIRST_SPECIAL + i for i, token in enumerate(special)}
    whole = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m) for m in known["merges"]]))
    whole.pre_tokenizer, whole.decoder = cut, decoders.ByteLevel()
    whole.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    whole.save(str(folder / "tokenizer.json"))
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {str(FIRST_SPECIAL + i): {"content": t, **entry} for i, t in enumerate(special)},
        "additional_special_tokens": special[260:266],
        "bos_token": special[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "eos_token": special[1],
        "fast_tokenizer": True,
        "gmask_token": "[gMASK]",
        "merges_file": None,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": special[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "trust_remote_code": True,
        "vocab_file": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    named = {"bos_token": special[0], "cls_token": "[CLS]", "eos_token": special[1], "pad_token": special[1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))


def make_model(folder: Path, texts: list[str]) -> None:
    """The checkpoint: config.json, generation_config.json, six shards and their index, the tokenizer, remote code."""
    import torch
    from safetensors.torch import save_file

    from treediff.model import llada

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    net = llada.random_backbone({**WIDTH, "vocab_size": CONFIG["vocab_size"]}, torch.bfloat16, "cpu")
    tensors = [(llada.official_name(n), p.detach().contiguous()) for n, p in net.named_parameters()]
    index, size = {}, 0
    for number in range(6):
        file = f"model-{number + 1:05}-of-00006.safetensors"
        shard = dict(tensors[number::6])
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        size += sum(t.nbytes for t in shard.values())
    listed = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **WIDTH}, indent=1))
    generation = {"_from_model_config": True, "bos_token_id": 126080, "eos_token_id": 126081}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    for name in ("configuration_llada.py", "modeling_llada.py"):
        (folder / name).write_text('raise SystemExit("code of a checkpoint was run")\n')
    make_tokenizer(folder, texts)


def make_data(folder: Path, rows: list[dict[str, str]]) -> None:
    """The data set: Parquet files in OpenCodeReasoning's columns under split_0/, and its card."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "split_0").mkdir(parents=True)
    more = {"source": "codeforces", "license": "cc-by-4.0", "dataset": "apps", "split": "train", "difficulty": "EASY"}
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist([{**r, **more} for r in part])
        pq.write_table(table, folder / "split_0" / f"train-{number:05}-of-00002.parquet")
    files = "  - config_name: split_0\n    data_files:\n      - split: split_0\n        path: split_0/train-*.parquet\n"
    (folder / "README.md").write_text(f"---\nlicense: cc-by-4.0\nconfigs:\n{files}---\n")


def make_benchmarks(folder: Path) -> dict[str, Path]:
    """Two problems of each benchmark in EvalPlus's format."""
    same = {"plus_input": [[5, 0], [-7, 2]], "base_input": [[1, 2], [3, 4]], "atol": 0, "contract": "", "test": ""}
    files = {name: folder / f"{name}.jsonl" for name in ("humaneval", "mbpp")}
    lines: dict[str, list[dict[str, Any]]] = {"humaneval": [], "mbpp": []}
    for number, (name, sign) in enumerate((("add", "+"), ("take_away", "-"))):
        head = f'def {name}(a: int, b: int) -> int:\n    """ Return a {sign} b.\n    """\n'
        body = f"    return a {sign} b\n"
        task = {"task_id": f"HumanEval/{number}", "prompt": head, "entry_point": name, "canonical_solution": body}
        lines["humaneval"].append(task | same)
        text = f'"""\nWrite a function {name} that returns a {sign} b.\nassert {name}(1, 0) == 1\n"""\n'
        task = {"task_id": f"Mbpp/{number + 3}", "prompt": text, "entry_point": name}
        lines["mbpp"].append(task | {"canonical_solution": f"def {name}(a, b):\n{body}"} | same)
    for name, file in files.items():
        file.write_text("".join(json.dumps(line) + "\n" for line in lines[name]))
    return files


# --- the hub -------------------------------------------------------------------------------------------------------
class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's interface as its client and `datasets` use it, with its two kinds of redirects; counts what it gives.

    Large files are answered by a redirect to another host, small ones by one to another path.
    """

    protocol_version = "HTTP/1.1"
    LARGE = (".safetensors", ".parquet")

    def __init__(self, root: Path, given: Counter[str], *args: Any) -> None:
        self.root, self.given = root, given
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, code: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        asked = self.rfile.read(size)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", self.path.split("?")[0]):
            from urllib.parse import parse_qs

            text = asked.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            listed = self.files(found[2], "")
            self.json([e for e in listed if e["path"] in paths])
        else:
            self.answer(404)

    def files(self, repo: str, below: str, recursive: bool = True) -> list[dict[str, Any]]:
        """The hub's entries of a repository's files and folders."""
        entries = []
        top = self.root / repo
        for path in sorted((top / below).rglob("*") if recursive else (top / below).iterdir()):
            name, oid = str(path.relative_to(top)), hashlib.sha1(str(path).encode()).hexdigest()
            if path.is_dir():
                entries.append({"type": "directory", "oid": oid, "size": 0, "path": name})
                continue
            size = path.stat().st_size
            entry = {"type": "file", "oid": oid, "size": size, "path": name}
            if path.suffix in self.LARGE:
                entry["lfs"] = {"oid": self.etag(path), "size": size, "pointerSize": 134}
            entries.append(entry)
        return entries

    @staticmethod
    @functools.cache
    def etag(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path)
        resolve = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found := re.fullmatch(r"/(?:cdn|api/resolve-cache)/([^/]+/[^/]+)/(.+)", path):
            return self.content(self.root / found[1] / found[2])
        repo = (api and api[2]) or (resolve and resolve[2])
        if not repo or not (self.root / repo).is_dir():
            return self.answer(404, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        sha = hashlib.sha1(repo.encode()).hexdigest()
        if api and api[3] == "tree":
            if not (self.root / repo / (api[5] or "")).is_dir():
                return self.answer(404, b'{"error": "not found"}', X_Error_Code="EntryNotFound")
            return self.json(self.files(repo, api[5] or "", "recursive=true" in query.lower()))
        if api:
            names = [e["path"] for e in self.files(repo, "") if e["type"] == "file"]
            facts = {"id": repo, "sha": sha, "private": False, "gated": False, "disabled": False, "tags": []}
            return self.json({**facts, "downloads": 0, "likes": 0, "siblings": [{"rfilename": n} for n in names]})
        file = self.root / repo / resolve[4]
        if not file.is_file():
            return self.answer(404, b"Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{self.etag(file)}"'}
        if file.suffix in self.LARGE:
            size, there = file.stat().st_size, f"http://localhost:{self.server.server_port}/cdn/{repo}/{resolve[4]}"
            linked = {"X_Linked_Size": size, "X_Linked_ETag": f'"{self.etag(file)}"'}
            return self.answer(302, **headers, **linked, Location=there)
        return self.answer(307, **headers, Location=f"/api/resolve-cache/{repo}/{resolve[4]}")

    def content(self, file: Path) -> None:
        if not file.is_file():
            return self.answer(404)
        body, etag = file.read_bytes(), f'"{self.etag(file)}"'
        repo = "/".join(file.relative_to(self.root).parts[:2])
        headers = {"ETag": etag, "X_Repo_Commit": hashlib.sha1(repo.encode()).hexdigest(), "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.command == "GET":
            self.given[str(file.relative_to(self.root))] += 1
        if asked:
            last = min(int(asked[2] or len(body)), len(body) - 1)
            part = body[int(asked[1]) : last + 1]
            return self.answer(206, part, **headers, Content_Range=f"bytes {asked[1]}-{last}/{len(body)}")
        if self.command == "HEAD":
            self.send_response(200)
            for name, value in {"Content_Length": len(body), **headers}.items():
                self.send_header(name.replace("_", "-"), str(value))
            return self.end_headers()
        return self.answer(200, body, **headers)


def serve(root: Path) -> tuple[http.server.ThreadingHTTPServer, Counter[str]]:
    """The hub of the folders below `root`, running, and how often it gave each file."""
    given: Counter[str] = Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, root, given))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, given


# --- the commands --------------------------------------------------------------------------------------------------
class Failed(Exception):
    """What a rehearsal found."""


PROMPT = re.compile(r"\[y/n\]|\(yes/no\)|password|Do you wish", re.I)
WARNING = re.compile(r"warn|deprecat|traceback|\berrors?\b", re.I)


def command(words: list[str], env: dict[str, str], folder: Path, limit: float) -> tuple[str, list[str]]:
    """What a command says on a terminal of its own, and the warnings in it. Raises Failed at a prompt, an error or the
    limit [s]."""
    ours, theirs = pty.openpty()
    began, said = time.monotonic(), b""
    print(f"$ treediff {' '.join(words)}", flush=True)
    argv = [sys.executable, "-W", "default::FutureWarning", "-m", "treediff.cli", *words]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=folder)
    os.close(theirs)

    def read() -> None:
        nonlocal said
        while True:
            try:
                said += os.read(ours, 65536)
            except OSError:  # the other end is closed
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if PROMPT.search(said.decode(errors="replace")):
                raise Failed(f"it asks something:\n{said.decode(errors='replace')[-600:]}")
            if time.monotonic() - began > limit:
                raise Failed(f"it takes more than {limit:.0f} s:\n{said.decode(errors='replace')[-600:]}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
    reader.join(5)
    os.close(ours)
    text = said.decode(errors="replace").replace("\r\n", "\n")
    if process.returncode:
        raise Failed(f"exit {process.returncode}:\n{text[-3000:]}")
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    found = [line for line in lines if WARNING.search(line)]
    print(f"  {time.monotonic() - began:.0f} s" + "".join(f"\n  ! {line}" for line in found), flush=True)
    return text, found


def outside(*folders: Path) -> list[str]:
    """Files below some folders that should be empty."""
    return [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()]


def rehearse(home: Path, short: bool, limit: float) -> None:
    from treediff.data import tinycode

    began = time.monotonic()
    rows = tinycode.training(48, 0)
    model, data = home / "hub" / MODEL, home / "hub" / DATA
    make_model(model, [f"{r['input']}\n{r['output']}" for r in rows])
    make_data(data, rows)
    benchmarks = make_benchmarks(home)
    local = home / "rows.parquet"
    shutil.copy(data / "split_0" / "train-00000-of-00002.parquet", local)
    server, given = serve(home / "hub")
    for name in ("home", "here", "tmp"):
        (home / name).mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TREEDIFF_", "XDG_", "HUGGING"))}
    env |= {"HOME": str(home / "home"), "TMPDIR": str(home / "tmp"), "HF_HOME": str(home / "hf"), "COLUMNS": "120"}
    env |= {"TREEDIFF_RUNS": str(home / "runs"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    files = [w for name, file in benchmarks.items() for w in (f"--benchmark_files.{name}", str(file))]
    small = ["--preset", "paper", "--rows", "16", "--max_steps", "2", "--eval_rows", "4"]
    small += ["--processes", "2", "--accumulation", "2", *files]
    small += ["--lengths", "32", "--limit", "1", "--benchmarks", "humaneval"] if short else []
    strategies = ["ast"] if short else ["none", *MASKINGS]

    warned: list[str] = []

    def run(words: list[str], env: dict[str, str]) -> str:
        said, found = command(words, env, home / "here", limit)
        warned.extend(found)
        return said

    def all_of(env: dict[str, str], *more: str) -> None:
        plan = run(["train", "--plan", *small, *more], env)
        if "1 GPUs" in plan or "hours of training" not in plan:
            raise Failed(f"a plan that says little:\n{plan}")
        run(["prepare", *small, *more], env)
        for strategy in strategies:
            run(["train", "--masking", strategy, *small, *more], env)
            run(["score", "--masking", strategy, *small, *more], env)
        run(["report", *small, *more], env)
        run(["export", str(Path(env["TREEDIFF_RUNS"]) / "export"), "--masking", "ast", *small, *more], env)

    all_of(env)
    twice = {name: n for name, n in given.items() if n > 1 and name.startswith(MODEL)}
    if twice:
        raise Failed(f"downloaded more than once: {twice}")
    if not [name for name in given if name.endswith(".safetensors")]:
        raise Failed("no shard was downloaded from the hub")
    print(f"the hub gave {len(given)} files, each of the model's once", flush=True)
    server.shutdown()
    if not short:
        env |= {"TREEDIFF_RUNS": str(home / "runs-local"), "HF_HOME": str(home / "hf-local")}
        all_of(env, "--backbone", str(model), "--tokenizer", str(model), "--data", str(local))
        if downloaded := outside(home / "hf-local"):
            raise Failed(f"without a hub these were written: {downloaded}")
    if warned:
        raise Failed("there were warnings:\n" + "\n".join(dict.fromkeys(warned)))
    check(home, strategies, short)
    if found := outside(home / "home", home / "here", home / "tmp"):
        raise Failed("outside the runs folder and HF_HOME lie " + ", ".join(found[:20]))
    print(f"rehearsed in {time.monotonic() - began:.0f} s: no prompt, no warning, no second download, nothing outside")


def check(home: Path, strategies: list[str], short: bool) -> None:
    """Raises Failed if a run lacks what the contract says."""
    for runs in [home / "runs"] + ([] if short else [home / "runs-local"]):
        for strategy in strategies:
            folder = runs / "paper" / f"{strategy}-seed0"
            wanted = [folder / "config.json"] + [folder / "adapter"] * (strategy != "none")
            wanted += [folder / "scores" / f"{b}-T{n}.json" for b, n in ([("humaneval", 32)] if short else JOBS)]
            wanted += [runs / "paper" / "report" / "report.html", runs / "export" / "config.json"]
            if lacking := [str(path) for path in wanted if not path.exists()]:
                raise Failed(f"not there: {', '.join(lacking)}")


JOBS = [(b, n) for b in ("humaneval", "mbpp") for n in (256, 512)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--short", action="store_true", help="one strategy, one short answer, from the hub alone")
    parser.add_argument("--keep", type=Path, help="an empty folder to leave everything in")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one command may take")
    args = parser.parse_args()
    home = args.keep or Path(tempfile.mkdtemp(prefix="rehearse-"))
    home.mkdir(exist_ok=True)
    try:
        rehearse(home.resolve(), args.short, args.limit)
    except Failed as e:
        sys.exit(f"rehearse: {e}")
    finally:
        if not args.keep:
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
