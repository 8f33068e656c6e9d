"""The command line: verbs over the Python API, nothing of its own.

Progress and tables go to stderr or stdout as they come; the last line on stdout is JSON. Exit code 0: done; 1: a gate
failed; 2: wrong use (one line says what was given, what is allowed and what to do); 130: stopped by Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dqbart import __version__
from dqbart.methods import METHODS
from dqbart.recipe import METRICS, PRESETS, Recipe, read_yaml

# Flags that are recipe fields, with their help. Flag over --config over --preset.
RECIPE_FLAGS: dict[str, tuple[Callable[[str], Any], str]] = {
    "bits": (str, "W-E-A: weights, embeddings, activations; 2 bits are ternary (2-2-8)"),
    "layers": (str, "E-D: encoder and decoder layers, one number for an encoder (as the teacher)"),
    "method": (str, f"how the student learns: {', '.join(METHODS)} (dq)"),
    "task": (str, f"what the model is for: {', '.join(METRICS)} (as the teacher's class says)"),
    "epochs": (float, "passes over the data; 0 quantizes without training"),
    "max_steps": (int, "optimizer steps, of each part of a method, in place of epochs"),
    "batch_size": (int, "examples per step and process"),
    "learning_rate": (float, "peak learning rate (by bits, method, depth and width)"),
    "source_column": (str, "column of the inputs (guessed)"),
    "pair_column": (str, "column of second texts, for tasks on pairs (guessed)"),
    "target_column": (str, "column of outputs or labels (guessed; without outputs the teacher writes them)"),
    "source_prefix": (str, "put before every input"),
    "source_lang": (str, "mBART language code of the inputs, such as en_XX"),
    "target_lang": (str, "mBART language code of the outputs, such as de_DE"),
    "language": (str, "code of the outputs' language, for scores (as --target-lang says, else en)"),
    "metric": (str, "what models are chosen by (by task: rouge, accuracy, spearman, ...)"),
    "seed": (int, "of everything random"),
}
RUN_KEYS = ("teacher", "data", "dev_data", "student", "output")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message}; see '{self.prog} --help'")


def parser() -> argparse.ArgumentParser:
    top = Parser(
        prog="dqbart", description="Make BART, mBART and BERT-like checkpoints 10 to 30 times smaller, and run them."
    )
    top.add_argument("--version", action="version", version=f"dqbart {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    verb = verbs.add_parser("compress", help="teacher and data in, packed folder out; rerun to resume")
    verb.add_argument(
        "teacher", nargs="?", metavar="MODEL", help="folder or hub id of a BART, mBART or BERT-like checkpoint"
    )
    verb.add_argument("--data", help="csv, tsv, jsonl (also .gz), parquet, a folder of splits or a hub id")
    verb.add_argument("--dev-data", help="the same, to select and score the student (a part of --data)")
    verb.add_argument("--student", help="float checkpoint that the student starts as (layers of the teacher)")
    verb.add_argument("--out", dest="output", help="folder to write")
    _add_recipe_flags(verb)
    verb.add_argument("--device", help="cpu or cuda")
    verb.add_argument("--overwrite", action="store_true", help="replace what another recipe left in --out")
    verb.set_defaults(run=run_compress)

    verb = verbs.add_parser("extract", help="a folder of a part of what --method dynabert trained")
    verb.add_argument("folder", metavar="FOLDER", help="what compress --method dynabert left")
    verb.add_argument("--width", type=float, default=1.0, help="share of heads and neurons (1)")
    verb.add_argument("--depth", type=float, default=1.0, help="share of layers (1)")
    verb.add_argument("--out", dest="output", required=True, help="folder to write")
    verb.set_defaults(run=run_extract)

    verb = verbs.add_parser("export", help="a packed folder as an ordinary float checkpoint, for other programs")
    verb.add_argument("folder", metavar="FOLDER", help="a packed folder")
    verb.add_argument("--out", dest="output", required=True, help="folder to write")
    verb.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (float32)")
    verb.set_defaults(run=run_export)

    verb = verbs.add_parser("augment", help="more training rows: words replaced by what a masked language model says")
    verb.add_argument("model", help="folder or hub id of a fill-mask checkpoint")
    verb.add_argument("--data", required=True, help="as for compress; its training split is read")
    verb.add_argument("--out", required=True, help="the .jsonl file to write")
    verb.add_argument("--vectors", help="text file of word vectors, for words of several pieces (the model's own)")
    verb.add_argument("--variants", type=int, default=20, help="of each text, at most (20)")
    verb.add_argument("--probability", type=float, default=0.4, help="that a word is replaced (0.4)")
    verb.add_argument("--language", default="en", help="of the stop words, which stay (en)")
    verb.add_argument("--source-column")
    verb.add_argument("--pair-column")
    verb.add_argument("--seed", type=int, default=28)
    verb.add_argument("--device")
    verb.set_defaults(run=run_augment)

    verb = verbs.add_parser("eval", help="score a packed folder (or any checkpoint) on data")
    verb.add_argument("model")
    verb.add_argument("--data", required=True)
    verb.add_argument("--task", choices=METRICS, help="as in its recipe.yaml, else as its class says")
    verb.add_argument("--split", default="test", help="test, validation, train, or as the data call it (test)")
    verb.add_argument("--metric", help="as in its recipe.yaml, else the task's first")
    verb.add_argument("--source-column")
    verb.add_argument("--pair-column")
    verb.add_argument("--target-column")
    verb.add_argument("--source-lang", help="mBART language code of the inputs, such as en_XX")
    verb.add_argument("--target-lang", help="mBART language code of the outputs, such as de_DE")
    verb.add_argument("--language", help="code of the references' language (as --target-lang says, else en)")
    verb.add_argument("--limit", type=int, help="a fixed sample of this many examples")
    verb.add_argument("--batch-size", type=int, default=32)
    verb.add_argument("--generation", metavar="JSON", default="{}", help="such as '{\"num_beams\": 1}'")
    verb.add_argument("--out", help="write all outputs there, one JSON object a line")
    verb.add_argument("--device")
    verb.set_defaults(run=run_eval)

    verb = verbs.add_parser("generate", help="write text with a packed folder")
    verb.add_argument("model")
    verb.add_argument("--text", action="append", help="an input; may be repeated; default: lines of stdin")
    verb.add_argument("--generation", metavar="JSON", default="{}")
    verb.add_argument("--source-lang", help="mBART language code of the inputs, such as en_XX")
    verb.add_argument("--target-lang", help="mBART language code of the outputs, such as de_DE")
    verb.add_argument("--device")
    verb.set_defaults(run=run_generate)

    for name, text, run in (
        ("info", "what a packed folder holds", run_info),
        ("verify", "check a packed folder: structure, digests, codes", run_verify),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("model")
        verb.set_defaults(run=run)

    verb = verbs.add_parser("bench", help="time the engines of a packed folder side by side on this machine")
    verb.add_argument("model")
    verb.add_argument("--against", metavar="MODEL", help="a checkpoint to hold it against, in transformers fp32")
    verb.add_argument("--source-length", type=int, default=128, help="tokens (128)")
    verb.add_argument("--new-tokens", type=int, default=32, help="tokens that every engine writes (32)")
    verb.add_argument("--batch-size", type=int, default=1)
    verb.add_argument("--beams", type=int, nargs="+", default=[1, 4], help="widths to time (1 4)")
    verb.add_argument("--threads", type=int, help="as torch would use")
    verb.add_argument("--rounds", type=int, default=5)
    verb.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    verb.add_argument("--save", action="store_true", help="put it into the folder's report.json and model card")
    verb.set_defaults(run=run_bench)

    verb = verbs.add_parser("sensitivity", help="what each layer costs when it alone is in few bits, untrained")
    verb.add_argument("teacher", metavar="MODEL", help="folder or hub id of the float checkpoint")
    verb.add_argument("--data", required=True, help="as for compress; its validation split is read, or the one file")
    _add_recipe_flags(verb)
    verb.add_argument("--per", choices=("layer", "module"), default="layer", help="what is a part (layer)")
    verb.add_argument("--score", action="store_true", help="score with each part, too: points lost")
    verb.add_argument("--limit", type=int, default=200, help="a fixed sample of this many examples (200)")
    verb.add_argument("--save", metavar="FOLDER", help="put it into the report.json of this packed folder")
    verb.add_argument("--device", help="cpu or cuda")
    verb.set_defaults(run=run_sensitivity)

    verb = verbs.add_parser("warmup", help="compile the GPU's kernels for a folder, so that no request waits for it")
    verb.add_argument("model")
    verb.add_argument("--device", default="cuda")
    verb.add_argument("--batch-size", type=int, nargs="+", default=[1], help="texts at a time (1)")
    verb.add_argument("--beams", type=int, nargs="+", default=[1, 4], help="widths (1 4)")
    verb.add_argument("--source-length", type=int, help="tokens of the longest text (as the model has positions)")
    verb.set_defaults(run=run_warmup)

    verb = verbs.add_parser("report", help="one HTML page, with plots, of packed folders or folders of such")
    verb.add_argument("folders", nargs="+", metavar="DIR")
    verb.add_argument("--out", default="report.html", help="the page (report.html); plots go to NAME-plots/ beside it")
    verb.set_defaults(run=run_report)

    verb = verbs.add_parser("doctor", help="versions, engines, and what is missing for the others")
    verb.set_defaults(run=run_doctor)

    verb = verbs.add_parser("demo", help="compress the shipped docstring teacher, offline, in minutes")
    verb.add_argument("--out", default="demo-out")
    verb.add_argument("--bits", default="2-2-8")
    verb.add_argument("--layers", default="3-2")
    verb.set_defaults(run=run_demo)
    return top


def _add_recipe_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--preset", choices=sorted(PRESETS), help="recipe to start from (small)")
    verb.add_argument("--config", help="YAML file of recipe fields")
    for name, (kind, text) in RECIPE_FLAGS.items():
        verb.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def recipe_and_run(args: argparse.Namespace) -> tuple[Recipe, dict[str, Any]]:
    """Flag over file over preset. Raises `ValueError` for whatever doesn't fit."""
    values = read_yaml(args.config) if args.config else {}
    run = {key: values.pop(key) for key in RUN_KEYS if key in values}
    run |= {key: getattr(args, key) for key in RUN_KEYS if getattr(args, key, None) is not None}
    if args.preset:
        values["preset"] = args.preset
    values |= {name: getattr(args, name) for name in RECIPE_FLAGS if getattr(args, name) is not None}
    return Recipe.from_dict({"preset": "small"} | values), run


def run_compress(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.pipeline import compress

    recipe, run = recipe_and_run(args)
    for key, flag in (("teacher", "MODEL"), ("output", "--out")):
        if not run.get(key):
            raise ValueError(f"{key} is missing: give {flag}, as in 'dqbart compress MODEL --data FILE --out DIR'")
    result = compress(
        run["teacher"], run.get("data"), output=run["output"], recipe=recipe, dev_data=run.get("dev_data"),
        student=run.get("student"), overwrite=args.overwrite, device=args.device,
    )  # fmt: skip
    return result.summary()


def run_extract(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.extraction import extract

    result = extract(args.folder, output=args.output, width=args.width, depth=args.depth)
    summary = result.summary() | {"subnetwork": result.report["subnetwork"]}
    del summary["seconds"]  # of the training that it was cut from
    return summary


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.dense import export

    output = export(args.folder, output=args.output, dtype=args.dtype)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"{output}: {size / 2**20:.1f} MiB, float: scores may differ, 'dqbart eval {output}' tells")
    return {"output": str(output), "file_bytes": size}


def run_augment(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.tasks.augment import augment_file

    counts = augment_file(
        args.model, args.data, args.out, text_column=args.source_column, pair_column=args.pair_column,
        vectors=args.vectors, variants=args.variants, probability=args.probability, language=args.language,
        seed=args.seed, device=args.device,
    )  # fmt: skip
    print(f"{args.out}: {counts['rows']:,} rows and {counts['written'] - counts['rows']:,} variants")
    return {"output": args.out} | counts


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.tasks.run import evaluate

    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # now, not after the work
    result, rows = evaluate(
        args.model, args.data, split=args.split, task=args.task, metric=args.metric,
        source_column=args.source_column, pair_column=args.pair_column, target_column=args.target_column,
        source_lang=args.source_lang, target_lang=args.target_lang, language=args.language, limit=args.limit,
        batch_size=args.batch_size, generation=_json_object(args.generation), device=args.device,
    )  # fmt: skip
    print(result)
    if args.out:
        Path(args.out).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return {"model": args.model} | result.to_dict()


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.tasks.run import write_texts

    texts = args.text if args.text is not None else [line for line in sys.stdin.read().splitlines() if line.strip()]
    written = write_texts(
        args.model, texts, generation=_json_object(args.generation), source_lang=args.source_lang,
        target_lang=args.target_lang, device=args.device,
    )  # fmt: skip
    for text in written:
        print(text)
    return {"model": args.model, "outputs": written}


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.packed.checkpoint import size_table
    from dqbart.packed.verify import model_class, read_config, read_spec

    folder = Path(args.model)
    config = read_config(folder)
    spec = read_spec(folder, config)
    kinds: dict[str, int] = {}
    for module in spec.modules.values():
        label = f"{module.bits}-bit {module.scheme} {module.kind}{' (tied)' if module.tied_to else ''}"
        kinds[label] = kinds.get(label, 0) + 1
    groups = dict(size_table(folder))
    print(f"{model_class(folder, config).__name__}, numerics {spec.numerics}, activations {spec.activation_bits} bits")
    for label, count in sorted(kinds.items()):
        print(f"  {count:4d} x {label}")
    for group, count in groups.items():
        print(f"  {group:18s} {count / 2**20:10.2f} MiB")
    print(f"  {'file':18s} {sum(groups.values()) / 2**20:10.2f} MiB")
    return {"model": args.model, "modules": kinds, "bytes": groups, "file_bytes": sum(groups.values())}


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    import dataclasses

    from dqbart.packed.verify import verify

    report = dataclasses.asdict(verify(args.model))
    print(f"{args.model}: {report['tensors']} tensors in {report['files']} file(s), as config.json says; digests match")
    return report


def run_bench(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.evaluation.bench import bench, lines, save

    found = bench(
        args.model, against=args.against, source_length=args.source_length, new_tokens=args.new_tokens,
        batch_size=args.batch_size, beams=tuple(args.beams), threads=args.threads, rounds=args.rounds,
        device=args.device,
    )  # fmt: skip
    for line in lines(found):
        print(line)
    if args.save:
        save(args.model, found)
    return {"model": args.model} | found


def run_sensitivity(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.evaluation.recorded import read_report, record
    from dqbart.tasks.sensitivity import lines, sensitivity

    recipe, run = recipe_and_run(args)
    if args.save:
        read_report(args.save)  # it is there: said now, not after the work
    rows = sensitivity(
        run["teacher"], run["data"], recipe, per=args.per, score_outputs=args.score, limit=args.limit,
        device=args.device,
    )  # fmt: skip
    for line in lines(rows):
        print(line)
    if args.save:
        record(args.save, sensitivity=rows)
    return {"model": str(run["teacher"]), "rows": rows}


def run_warmup(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.engines.warmup import warm_up

    return {"model": args.model} | warm_up(
        args.model, device=args.device, batch_sizes=args.batch_size, beams=args.beams, source_length=args.source_length
    )


def run_report(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.evaluation.report import report

    return report(args.folders, args.out)


def run_doctor(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.doctor import examine

    findings = examine()
    for line in findings.pop("lines"):
        print(line)
    return findings


def run_demo(args: argparse.Namespace) -> dict[str, Any]:
    from dqbart.demo import demo

    return demo(Path(args.out), bits=args.bits, layers=args.layers)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'--generation {text!r}: not valid JSON ({error}); expected such as {{"num_beams": 1}}'
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f'--generation {text!r}: expected an object, such as {{"num_beams": 1}}')
    return value


def main(argv: Sequence[str] | None = None) -> int:
    first = os.environ.get("RANK", "0") == "0"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or every fork warns
    try:
        args = parser().parse_args(argv)
        if args.verb not in ("doctor", "report"):
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
        answer = args.run(args)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if args.verb in ("compress", "demo") else ""
        print(f"dqbart: stopped{goes_on}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"dqbart: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "GateError":
            raise
        print(f"dqbart: gate failed: {error}", file=sys.stderr)
        return 1
    if first:
        print(json.dumps(answer, ensure_ascii=False))
    return 0
