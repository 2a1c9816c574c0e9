"""The stages as commands: treediff annotate | prepare | train | export | sample | score | report | reproduce.

Every command takes `--preset`, `--masking`, `--seed` and any switch by name (`treediff switches` lists them); the
entries of a mapping are set as `--pretrain.max_steps 500`. Exit codes: 0 done, 2 a bad input, switch or file (one
sentence on stderr), 75 a training that SIGTERM stopped after a checkpoint, 1 anything else.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from treediff.config import PRESETS, SWITCHES, Config, resolve, runs_root
from treediff.errors import Preempted, UserError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="treediff", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, preset: str = "tiny") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--preset", default=preset, help=f"{', '.join(PRESETS)}; by default {preset}")
        sub.epilog = "Any switch of `treediff switches` may be given as --name value."
        return sub

    sub = command("annotate", "print a source file coloured by tier; its suffix, or --language, says in which language")
    sub.add_argument("file", type=Path)
    # Data and a tokenizer are given, so the paper's lengths apply.
    sub = command("prepare", "encode a data set and report how many rows were dropped for which reason", "paper")
    sub.add_argument("--out", type=Path, help="folder of the data set; without it, under runs/<preset>/data")
    sub = command("train", "train one run, and the backbone and data that it needs")
    sub.add_argument("--plan", action="store_true", help="only say what it would take: steps, hours, memory, disk")
    sub = command("export", "write a trained run's model, adapter merged, in LLaDA's own checkpoint format")
    sub.add_argument("out", type=Path, help="folder to make: model*.safetensors, config.json, tokenizer")
    sub = command("sample", "sample the benchmarks from one run, training it first if need be")
    sub.add_argument("--prompt", help="answer this one prompt in the terminal instead, denoising it before your eyes")
    sub = command("score", "score one run's samples, or any file of samples, in a sandbox")
    sub.add_argument("--benchmark", help="humaneval, mbpp or tinycode, with --samples and --out")
    sub.add_argument("--data", type=Path, help="the benchmark's problems, as EvalPlus packs them (without: downloaded)")
    sub.add_argument("--samples", type=Path, help="JSONL of task_id and completion or solution")
    sub.add_argument("--out", type=Path, help="the ledger to write")
    command("report", "tables and figures of all runs of a preset")
    command("reproduce", "execute the notebooks 01 to 06 and name the report")
    command("switches", "list every switch with its meaning and its value in the preset")
    return top


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `treediff` command."""
    args, extra = parser().parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "papermill", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        COMMANDS[args.command](args, extra)
    except UserError as e:
        print(f"treediff {args.command}: {e}", file=sys.stderr)
        sys.exit(2)
    except Preempted as e:
        print(f"treediff {args.command}: {e}", file=sys.stderr)
        sys.exit(Preempted.EXIT)
    except KeyboardInterrupt:
        print(f"treediff {args.command}: stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        print(f"treediff {args.command}: {e.filename or 'system'}: {e.strerror or e}.", file=sys.stderr)
        sys.exit(1)


def switches(args: argparse.Namespace, extra: list[str], **given: Any) -> Config:
    """The switches of a command line: its preset and every `--name value` or `--name.key value`."""
    found: dict[str, Any] = {k: str(v) for k, v in given.items() if v is not None}
    while extra:
        name, *extra = extra
        if not name.startswith("--"):
            raise UserError(f"{name}: not understood; switches are given as --name value.")
        name, equals, value = name[2:].partition("=")
        if not equals:
            if not extra:
                raise UserError(f"{name}: no value is given.")
            value, *extra = extra
        name, _, key = name.replace("-", "_").partition(".")
        if key:
            found.setdefault(name, {})[key] = value
        else:
            found[name] = value
    return resolve(args.preset, **found)


def annotate(args: argparse.Namespace, extra: list[str]) -> None:
    from treediff.figures import plots
    from treediff.masking import tiers

    cfg = switches(args, extra)
    named = any(x.partition("=")[0] == "--language" for x in extra)
    language = cfg.language if named else tiers.language_of(args.file)
    parsed = tiers.parse(tiers.read_source(args.file), language)
    print(plots.ansi(parsed.source, tiers.byte_tiers(parsed, cfg.tier_owner)), end="")
    if parsed.source:
        legend = b"default skeleton data condition control"
        codes = [i for i, word in enumerate(legend.split()) for _ in word + b" "][: len(legend)]
        import numpy as np

        print(f"\n{plots.ansi(legend, np.array(codes, np.uint8))}", file=sys.stderr)
    if bad := tiers.error_bytes(parsed):
        logging.warning(
            "%s: %d of %d bytes do not parse; they take the default tier.", args.file, bad, len(parsed.source)
        )


def prepare(args: argparse.Namespace, extra: list[str]) -> None:
    import json

    from treediff import pipeline
    from treediff.data import prepare

    cfg = switches(args, extra)
    print(json.dumps(pipeline.statistics(cfg, args.out), indent=1))
    folder = args.out or prepare.data_folder(cfg)
    print(f"{folder}: open it with datasets.load_from_disk.", file=sys.stderr)


def train(args: argparse.Namespace, extra: list[str]) -> None:
    from treediff import pipeline
    from treediff.training import plan

    cfg = switches(args, extra)
    if args.plan:
        print(plan.text(plan.plan(cfg)))
        plan.require_room(cfg)
    else:
        print(pipeline.trained(cfg))


def export(args: argparse.Namespace, extra: list[str]) -> None:
    from treediff.data import sources
    from treediff.masking import tokens
    from treediff.model import checkpoint
    from treediff.sampling import diffusion
    from treediff.training import launch

    cfg = switches(args, extra)
    if not launch.is_trained(cfg):
        raise UserError(f"{cfg.run_dir}: not trained yet; run `treediff train` with the same switches first.")
    if args.out.exists():
        raise UserError(f"{args.out}: exists already; name a folder to be made.")
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    checkpoint.save_backbone(diffusion.load_run(cfg), args.out, tok)
    print(args.out)


def sample(args: argparse.Namespace, extra: list[str]) -> None:
    from treediff import pipeline
    from treediff.sampling import terminal

    cfg = switches(args, [x for x in extra if not x.startswith("--local_rank=")])  # deepspeed's launcher adds it
    if args.prompt is not None:
        if not cfg.model:
            pipeline.trained(cfg)
        terminal.stream(cfg, args.prompt, sys.stdout)
        return
    for path in pipeline.all_sampled(cfg).values():
        print(path)


def score(args: argparse.Namespace, extra: list[str]) -> None:
    from treediff import pipeline
    from treediff.scoring import score as scoring

    if args.benchmark or args.samples or args.out:
        for name in ("benchmark", "samples", "out"):
            if getattr(args, name) is None:
                raise UserError(f"--{name}: needed together with --benchmark, --samples and --out.")
        cfg = switches(args, extra)
        ledger = scoring.score(args.benchmark, args.data, args.samples, args.out, workers=cfg.workers)
        counts = scoring.passes(ledger)
        print(f"{args.benchmark}: base {counts['base']}/{counts['n']}, plus {counts['plus']}/{counts['n']}")
        for line in scoring.passes_at(ledger):
            print(line)
        return
    cfg = switches(args, extra, data=args.data)
    pipeline.all_sampled(cfg)
    for benchmark in cfg.benchmarks:
        for length in cfg.lengths:
            print(pipeline.scored(cfg, benchmark, length))


def report(args: argparse.Namespace, extra: list[str]) -> None:
    from treediff import pipeline

    print(pipeline.reported(switches(args, extra)))


def reproduce(args: argparse.Namespace, extra: list[str]) -> None:
    import papermill

    from treediff.strategies import MASKINGS

    cfg = switches(args, extra)
    folder = notebooks()
    stages = [("01_ast", None), ("02_masking", None), *(("03_train", m) for m in MASKINGS)]
    stages += [("04_sample", None), ("05_score", None), ("06_report", None)]
    parameters = {k: v for k, v in cfg.as_dict().items() if v != getattr(resolve(args.preset), k)}
    out = (runs_root() / cfg.preset / "notebooks").resolve()
    out.mkdir(parents=True, exist_ok=True)
    for number, (name, masking) in enumerate(stages, start=1):
        title = f"{name}-{masking}" if masking else name
        print(f"[{number}/{len(stages)}] {title}", file=sys.stderr, flush=True)
        chosen = {**parameters, "preset": cfg.preset, **({"masking": masking} if masking else {})}
        try:
            papermill.execute_notebook(
                str(folder / f"{name}.ipynb"),
                str(out / f"{title}.ipynb"),
                parameters=chosen,
                kernel_name=_kernel(),
                progress_bar=False,
                stdout_file=sys.stderr,
                stderr_file=sys.stderr,
            )
        except papermill.PapermillExecutionError as e:
            raise UserError(f"{out / title}.ipynb: {e.ename}: {e.evalue}") from None
    print(f"report: {cfg.preset_dir.resolve() / 'report' / 'report.html'}")


def notebooks() -> Path:
    """The folder of the notebooks: beside the package, or where the container put them."""
    import os

    for folder in (
        os.environ.get("TREEDIFF_NOTEBOOKS"),
        Path.cwd() / "notebooks",
        Path(__file__).parents[1] / "notebooks",
    ):
        if folder and (Path(folder) / "01_ast.ipynb").is_file():
            return Path(folder)
    raise UserError("notebooks: not found; run this in the project's folder, or set TREEDIFF_NOTEBOOKS.")


def _kernel() -> str:
    """The kernel of this very Python, whatever kernels of the same name the user has elsewhere."""
    import os

    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    return "python3"


def list_switches(args: argparse.Namespace, extra: list[str]) -> None:
    cfg = switches(args, extra)
    for name, f in SWITCHES.items():
        paper = f" [paper: {f.metadata['paper']}]" if f.metadata["paper"] else ""
        print(f"--{name} {getattr(cfg, name)!r}\n    {f.metadata['help']}{paper}")


COMMANDS = {
    "annotate": annotate,
    "prepare": prepare,
    "train": train,
    "export": export,
    "sample": sample,
    "score": score,
    "report": report,
    "reproduce": reproduce,
    "switches": list_switches,
}

if __name__ == "__main__":
    main()
