"""The stages as commands: treediff annotate | prepare | train | export | sample | infill | score | study | report ...

Every command takes `--preset`, `--masking`, `--seed` and any switch by name (`treediff COMMAND --help` lists those that
matter to it, `treediff switches` all); the entries of a mapping are set as `--pretrain.max_steps 500`. Exit codes:
0 done, 2 a bad input, switch or file (one sentence on stderr), 75 a training that SIGTERM stopped after a checkpoint,
1 anything else.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from treediff.config import PRESETS, SWITCHES, Config, known, resolve, runs_root
from treediff.errors import Preempted, UserError

QUIET = ["--IPKernelApp.log_level=40"]
"""A kernel's own warnings are not what a notebook has to say."""
STAGES = {"run": "the run", "data": "data", "train": "training", "sample": "sampling"}
"""The groups of switches, by what depends on them."""
LISTED = {
    "annotate": ["data"],
    "prepare": ["run", "data"],
    "train": ["run", "data", "train"],
    "score": ["run", "sample"],
}
"""Those that a command's help lists, where it is not all of them; every command takes every switch."""


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a sentence like every other bad input's."""

    def error(self, message: str) -> NoReturn:
        """Complain as every bad input does."""
        raise UserError(message)


def parser(chosen: str | None = None, preset: str | None = None) -> Parser:
    """All commands; the `chosen` one with the switches as options, listed with their values in the `preset`."""
    top = Parser(prog="treediff", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, usual: str = "tiny") -> Parser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--preset", default=usual, help=f"{', '.join(PRESETS)}; by default {usual}")
        return sub

    sub = command("annotate", "print a source file coloured by tier; its suffix, or --language, says in which language")
    sub.add_argument("file", type=Path)
    # Data and a tokenizer are given, so the paper's lengths apply.
    sub = command("prepare", "encode a data set and report how many rows were dropped for which reason", "paper")
    sub.add_argument("--out", type=Path, help="folder of the data set; without it, under runs/<preset>/data")
    sub.add_argument("--share", metavar="K/N", help="encode only share K of N, from 0: several machines, one folder")
    sub = command("train", "train one run, and the backbone and data that it needs")
    sub.add_argument("--plan", action="store_true", help="only say what it would take: steps, hours, memory, disk")
    sub = command("export", "write a trained run's model, adapter merged, in LLaDA's own checkpoint format")
    sub.add_argument("out", type=Path, help="folder to make: model*.safetensors, config.json, tokenizer")
    sub = command("sample", "sample the benchmarks from one run, training it first if need be")
    sub.add_argument("--prompt", help="answer this one prompt in the terminal instead, denoising it before your eyes")
    sub.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it
    sub = command("infill", "fill a hole of FILE, denoising it before your eyes; without FILE, a benchmark's holes")
    sub.add_argument("file", nargs="?", type=Path, help="a source file; without it the holes of `holes` are filled")
    sub.add_argument("--line", type=int, help="the hole is this line of FILE, from 1 (or mark it with <fill>)")
    sub.add_argument("--node", help="the hole is the syntax node of FILE at LINE:COLUMN, both from 1")
    sub.add_argument("--publish", type=Path, metavar="DIR", help="write what all runs have filled to this folder")
    sub.add_argument("--problems", type=Path, help="HumanEval-Infilling's file for --holes (without: downloaded)")
    sub = command("score", "score one run's samples, or any file of samples, in a sandbox")
    sub.add_argument("--benchmark", help="humaneval, mbpp or tinycode, with --samples and --out")
    sub.add_argument("--problems", type=Path, help="its problems, as EvalPlus packs them (without: downloaded)")
    sub.add_argument("--samples", type=Path, help="JSONL of task_id and completion or solution")
    sub.add_argument("--out", type=Path, help="the ledger to write")
    sub = command("study", "train, sample and score many runs of each strategy, and say what they show together")
    sub.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each strategy; by default 2")
    sub.add_argument("--backbones", type=int, default=1, metavar="N", help="backbones that they share; by default 1")
    sub.add_argument("--strategies", help="maskings to compare; by default random,ast_span,ast")
    sub.add_argument("--arm", action="append", default=[], help="one more: 'MASKING/NAME: switch=value; switch=value'")
    sub.add_argument("--cross", action="append", default=[], help="'switch=value,value': each strategy with each value")
    sub.add_argument(
        "--at_once", type=int, default=0, metavar="N", help="runs at a time; 0: as many as there is room for"
    )
    sub.add_argument("--plan", action="store_true", help="only say what it would take, and what it could resolve")
    sub.add_argument("--deviation", type=float, default=0.0, help="for the plan: a pilot's between runs [points]")
    sub.add_argument("--collect", action="store_true", help="run nothing: write the results of the runs that are there")
    sub.add_argument("--publish", type=Path, metavar="DIR", help="write the finished study's results to this folder")
    command("report", "tables and figures of all runs of a preset")
    command("reproduce", "execute the notebooks 01 to 06 and name the report")
    sub = command("doctor", "say what this machine has and lacks for a preset's run, and how to get it")
    sub.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    sub = command("verify", "check the claims of docs/claims.toml: held, failed, or needs what is not here")
    sub.add_argument("names", nargs="*", metavar="NAME", help="claims; without any, all")
    sub.add_argument("--quick", action="store_true", help="only those that take a minute or less")
    sub.add_argument("--plan", action="store_true", help="only say what each takes, and what it needs that is not here")
    sub.add_argument("--record", action="store_true", help="keep the results and write docs/claims.md from them")
    command("switches", "list every switch with its meaning, what it takes and its value in the preset")
    if listed := commands.choices.get(chosen):
        add_switches(listed, resolve(preset or listed.get_default("preset")), *LISTED.get(chosen, STAGES))
    return top


def add_switches(to: Parser, cfg: Config, *stages: str) -> None:
    """Every switch as an option of `to`; its help lists those of `stages`, with what they take and their values."""
    to.usage = f"{' '.join(to.format_usage().split()[1:])} [--SWITCH VALUE ...]"
    for stage, title in STAGES.items():
        group = to.add_argument_group(f"switches: {title}")
        for switch in (s for s in SWITCHES.values() if s.stage == stage and s.name != "preset"):
            value = getattr(cfg, switch.name)
            value = value if isinstance(value, str) and value else json.dumps(value)
            paper = f"; paper: {switch.paper}" if switch.paper else ""
            text = f"{switch.help} [{cfg.preset}: {value}{paper}]".replace("%", "%%")
            text = text if stage in stages else argparse.SUPPRESS
            options = [f"--{switch.name}", *(["--as"] if switch.name == "decoding" else [])]
            group.add_argument(*options, metavar=switch.takes, default=argparse.SUPPRESS, help=text)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `treediff` command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "papermill", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # matplotlib keeps a list of the fonts that it found: with the runs, not in the home folder.
    os.environ.setdefault("MPLCONFIGDIR", str(runs_root().resolve() / "cache" / "matplotlib"))
    first = Parser(add_help=False, allow_abbrev=False)  # which switches to list, with which preset's values
    first.add_argument("command", nargs="?")
    first.add_argument("--preset", nargs="?")
    argv = underscored(sys.argv[1:] if argv is None else argv)
    name, preset = vars(first.parse_known_args(argv)[0]).values()
    told = f"treediff {name}:" if name else "treediff:"
    try:
        args, extra = parser(name, preset).parse_known_args(argv)
        COMMANDS[args.command](args, switches(args, extra))
    except UserError as e:
        print(told, e, file=sys.stderr)
        sys.exit(2)
    except Preempted as e:
        print(told, e, file=sys.stderr)
        sys.exit(Preempted.EXIT)
    except KeyboardInterrupt:
        print(told, "stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    except OSError as e:
        print(told, f"{e.filename or 'system'}: {e.strerror or e}.", file=sys.stderr)
        sys.exit(1)


def underscored(argv: list[str]) -> list[str]:
    """The arguments with dashes in the names of options as underscores, and `--name.key value` as one: argparse would
    take that value for a file."""
    out: list[str] = []
    for x in argv:
        name, equals, value = x.partition("=")
        if out and out[-1].startswith("--") and "." in out[-1] and "=" not in out[-1]:
            out[-1] += f"={x}"
        else:
            out.append("--" + name[2:].replace("-", "_") + equals + value if x.startswith("--") else x)
    return out


def switches(args: argparse.Namespace, extra: list[str]) -> Config:
    """The switches of a command line: those that argparse knows, and every `--name.key value`."""
    found = {name: value for name, value in vars(args).items() if name in SWITCHES}
    while extra:
        option, *extra = extra
        if not option.startswith("--"):
            if getattr(args, "file", "") is None:  # argparse does not see an optional file behind the switches
                args.file = Path(option)
                continue
            raise UserError(f"{option}: not understood; switches are given as --name value.")
        option, equals, value = option[2:].partition("=")
        name, _, key = option.partition(".")
        known(name, SWITCHES)
        if not equals:
            if not extra:
                raise UserError(f"{option}: no value is given.")
            value, *extra = extra
        if not isinstance(found.setdefault(name, {}), dict):
            raise UserError(f"{name}: give it whole or by its entries, not both.")
        found[name][key] = value
    return resolve(**found)


def annotate(args: argparse.Namespace, cfg: Config) -> None:
    """Print a file coloured by tier."""

    from treediff.figures import plots
    from treediff.masking import tiers

    language = cfg.language if "language" in args else tiers.language_of(args.file)
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
    for number, token in tiers.missing_tokens(parsed):
        logging.warning(
            "%s: line %d: %r is missing; the tiers are those of the code with it.", args.file, number, token
        )


def prepare(args: argparse.Namespace, cfg: Config) -> None:
    """Make a data set; print its statistics."""

    from treediff import pipeline
    from treediff.data import prepare

    if args.share:
        number, slash, of = args.share.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal()):
            raise UserError(f"--share: {args.share!r} is not K/N, such as 0/16.")
        print(pipeline.share_prepared(cfg, int(number), int(of), args.out))
        return
    print(json.dumps(pipeline.statistics(cfg, args.out), indent=1))
    folder = args.out or prepare.data_folder(cfg)
    print(f"{folder}: open it with datasets.load_from_disk.", file=sys.stderr)


def train(args: argparse.Namespace, cfg: Config) -> None:
    """Train a run, or say what it would take."""

    from treediff import pipeline
    from treediff.data import reach
    from treediff.training import plan

    if args.plan:
        found = pipeline.reach_of(cfg)
        print(plan.text(plan.plan(cfg)), "", sep="\n")
        print(reach.text(found) if found else "reach of the rules: known once the data is prepared (treediff prepare)")
        plan.require_room(cfg)
    else:
        print(pipeline.trained(cfg))


def export(args: argparse.Namespace, cfg: Config) -> None:
    """Write a run's merged model."""

    from treediff import cards, pipeline
    from treediff.data import sources
    from treediff.masking import tokens
    from treediff.model import checkpoint
    from treediff.sampling import diffusion
    from treediff.training import launch

    if not launch.is_trained(cfg):
        raise UserError(f"{cfg.run_dir}: not trained yet; run `treediff train` with the same switches first.")
    if args.out.exists():
        raise UserError(f"{args.out}: exists already; name a folder to be made.")
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    card = cards.model_card(cfg, "export", pipeline.results_said(cfg))
    checkpoint.save_backbone(diffusion.load_run(cfg), args.out, tok, card=card)
    print(args.out)


def sample(args: argparse.Namespace, cfg: Config) -> None:
    """Sample the benchmarks, or answer one prompt."""

    from treediff import pipeline
    from treediff.sampling import terminal

    if args.prompt is not None:
        if not cfg.model:
            pipeline.trained(cfg)
        terminal.stream(cfg, args.prompt, sys.stdout)
        return
    for path in pipeline.all_sampled(cfg).values():
        print(path)


def infill(args: argparse.Namespace, cfg: Config) -> None:
    """Fill holes of a hole set, or of one file."""

    from treediff import pipeline
    from treediff.data import holes
    from treediff.masking import tiers
    from treediff.sampling import terminal

    path = args.file
    if cfg.protocol != "none":
        raise UserError("protocol: the published evaluations fill no holes; leave it out.")
    if args.publish:
        from treediff.report import infill as results

        print(results.publish(cfg, args.publish))
        return
    if args.problems:
        cfg = cfg.but(benchmark_files={**cfg.benchmark_files, cfg.holes: str(args.problems)})
    if path is None:
        for name in ("line", "node"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name}: in which file? Give it: treediff infill FILE --{name} ...")
        for hole_set in holes.sets(cfg):
            print(pipeline.infilled(cfg, hole_set))
            print(pipeline.infill_said(cfg, hole_set))
        return
    if args.line is not None and args.node is not None:
        raise UserError("--line: one hole at a time; give --line or --node.")
    source = tiers.read_source(path)
    if args.line is not None:
        hole = holes.at_line(str(path), source, args.line)
    elif args.node is not None:
        language = cfg.language if "language" in args else tiers.language_of(path)
        hole = holes.at_node(str(path), source, args.node, language)
    else:
        hole = holes.marked(str(path), source)
    if "backbone" in args and "masking" not in args:  # a backbone was named, so that is the model
        cfg = cfg.but(masking="none", **({} if "tokenizer" in args else {"tokenizer": cfg.backbone}))
    if cfg.masking != "none" or cfg.backbone == "pretrain":
        pipeline.trained(cfg)
    terminal.fill(cfg, hole, sys.stdout)


def score(args: argparse.Namespace, cfg: Config) -> None:
    """Score a run, or a file of samples."""

    from treediff import pipeline
    from treediff.data import stdlib
    from treediff.files import read_json
    from treediff.scoring import departures, restore
    from treediff.scoring import score as scoring
    from treediff.scoring.run import read as read_ledger

    if args.benchmark or args.problems or args.samples or args.out:
        for name in ("benchmark", "samples", "out"):
            if getattr(args, name) is None:
                raise UserError(f"--{name}: needed together with --benchmark, --samples and --out.")
        scoring.score(args.benchmark, args.problems, args.samples, args.out, workers=cfg.workers)
        ledger = read_ledger(args.out, cfg.verdicts)
        counts, others = scoring.passes(ledger), scoring.passes(departures.other(ledger))
        print(f"{args.benchmark}: base {counts['base']}/{counts['n']}, plus {counts['plus']}/{counts['n']}")
        if counts != others:
            who = "EvalPlus 0.3.1 counts" if cfg.verdicts == "own" else "our own verdicts:"
            why = "; ".join(f"{task}: {reason}" for task, reason in ledger["departures"].items())
            print(f"{who} base {others['base']}/{others['n']}, plus {others['plus']}/{others['n']} ({why})")
        for line in scoring.passes_at(ledger):
            print(line)
        return
    pipeline.all_sampled(cfg)
    for benchmark, length in cfg.jobs:
        print(pipeline.scored(cfg, benchmark, length))
    if cfg.data in stdlib.SOURCES:
        path = pipeline.restored(cfg)
        for tier, found in restore.shares(read_json(path)).items():
            print(f"{tier}: {100 * found['share']:.1f} % of {found['nodes']} nodes of {found['programs']} functions")
        print(path)


def study(args: argparse.Namespace, cfg: Config) -> None:
    """Make, plan, collect or publish a study."""

    from treediff import jobs
    from treediff.report import study as results
    from treediff.strategies import MASKINGS

    if args.publish:
        print(results.publish(cfg, args.publish))
        return
    strategies = args.strategies.split(",") if args.strategies else MASKINGS
    chosen = results.Study(cfg, results.arms(cfg, strategies, args.arm, args.cross), args.seeds, args.backbones)
    if args.plan:
        print(jobs.text(jobs.plan(chosen, args.at_once, args.deviation)))
        return
    facts = jobs.collect(chosen) if args.collect else jobs.run(chosen, args.at_once)
    print(facts["answer"])
    print(cfg.preset_dir / cfg.named("study") / "study.md", file=sys.stderr)
    for missing in facts["missing"]:
        logging.warning("missing: %s: %s", missing["run"], missing["why"])
    if facts["missing"] and not args.collect:
        sys.exit(1)


def report(args: argparse.Namespace, cfg: Config) -> None:
    """Write the report."""

    from treediff import pipeline

    print(pipeline.reported(cfg))


def reproduce(args: argparse.Namespace, cfg: Config) -> None:
    """Run all notebooks."""

    import papermill

    from treediff.strategies import MASKINGS

    folder = notebooks()
    stages = [("01_ast", None), ("02_masking", None), *(("03_train", m) for m in MASKINGS)]
    stages += [("04_sample", None), ("05_score", None), ("06_report", None)]
    parameters = {k: v for k, v in cfg.as_dict().items() if v != getattr(resolve(cfg.preset), k)}
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
                extra_arguments=QUIET,
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


def doctor(args: argparse.Namespace, cfg: Config) -> None:
    """Say what is here and what is not; exit code 1 if the run cannot be made."""

    from treediff import doctor

    checks = doctor.examine(cfg)
    print(json.dumps([c._asdict() for c in checks], indent=1) if args.json else doctor.text(checks))
    sys.exit(doctor.worst(checks))


def verify(args: argparse.Namespace, cfg: Config) -> None:
    """Check claims; exit code 1 if one failed."""

    from treediff import verify

    claims = verify.chosen(verify.load(), args.names, args.quick)
    if args.plan:
        print(verify.plan(claims))
        return
    results = []
    for number, claim in enumerate(claims, 1):
        print(f"[{number}/{len(claims)}] {claim.command} (about {claim.minutes:g} min)", file=sys.stderr, flush=True)
        results.append(verify.verify(claim))
        print(verify.line(claim, results[-1]), flush=True)
    counts = {state: sum(r["state"] == state for r in results) for state in ("held", "failed", "needs")}
    print(f"{counts['held']} held, {counts['failed']} failed, {counts['needs']} need what is not here")
    if args.record:
        print(verify.record(results), file=sys.stderr)
    sys.exit(int(counts["failed"] > 0))


def list_switches(args: argparse.Namespace, cfg: Config) -> None:
    """Print every switch."""
    table = Parser(prog="treediff COMMAND", add_help=False)
    add_switches(table, cfg, *STAGES)
    table.print_help()


COMMANDS = {
    "annotate": annotate,
    "prepare": prepare,
    "train": train,
    "export": export,
    "sample": sample,
    "infill": infill,
    "score": score,
    "study": study,
    "report": report,
    "reproduce": reproduce,
    "doctor": doctor,
    "verify": verify,
    "switches": list_switches,
}

if __name__ == "__main__":
    main()
