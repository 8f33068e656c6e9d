"""DynaBERT's promise, train once and deploy many, held against training each of the many by itself.

    python benchmarks/subnetworks.py TEACHER --data DATA --work DIR [--steps 1500] [--seeds 28 29] [--quick]

Problem: a network whose parts must all work shares its weights among them; what a part pays for that is only seen
beside the same part trained alone. Method: a fine-tuned classifier TEACHER is rewired once. `dynabert` trains all
sub-networks together (`dqbart.compress`, `--steps` of width, as many of depth); `alone` trains each by itself, begun as
the same part of the same rewired network, held to the teacher by the losses of the last stage throughout, for as many
steps as all stages together; `untrained` is the part as it was cut. All are scored on the test split, in float.
Rejected: small students of another shape for `alone`, where shape and method would change at the same time.

A rerun goes on where the last one was stopped. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from ledger import CHECKPOINT, RESULTS, Ledger, fingerprint, markdown, require_same_files, resumable

STUDY = ("teacher", "data", "steps", "learning_rate", "widths", "depths")  # what rows must share to be compared
KEYS = (*STUDY, "how", "width", "depth", "seed")
HOW = ("untrained", "alone", "dynabert")
WIDTHS, DEPTHS = (1.0, 0.75, 0.5, 0.25), (1.0, 0.75, 0.5)
QUICK = dict(steps=2, widths=[1.0, 0.5], depths=[1.0], seeds=[28])


class Study:
    """One teacher, one data set, one seed; `folder` keeps what is trained."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        import dqbart

        rate = f"-{args.learning_rate:g}" if args.learning_rate else ""
        self.args, self.folder = args, args.work / f"{args.steps}-{seed}{rate}"
        self.recipe = dqbart.Recipe(
            bits="32-32-32", method="dynabert", widths=tuple(args.widths), depths=tuple(args.depths),  # type: ignore[arg-type]
            max_steps=args.steps, warmup_ratio=0.1, learning_rate=args.learning_rate, dev_subset=1000, seed=seed,
        )  # fmt: skip

    def whole(self, *, trained: bool) -> Any:
        """The rewired network, before or after all its parts are trained together."""
        import dqbart

        recipe = self.recipe if trained else dqbart.Recipe.from_dict(self.recipe.to_dict() | UNTRAINED)
        folder = self.folder / ("dynabert" if trained else "rewired")
        return dqbart.compress(
            self.args.teacher, self.args.data, recipe=recipe, output=folder, device=self.args.device
        ).load()

    def alone(self, width: float, depth: float) -> Any:
        """The rewired network after one part was trained, for the steps of all stages, by the last one's losses."""
        from dqbart.data.columns import sample
        from dqbart.distill import trainer
        from dqbart.distill.elastic import ElasticObjective, Stage
        from dqbart.fitting import resolve
        from dqbart.quant.attention import use_attention
        from dqbart.student.width import subnetwork
        from dqbart.tasks import open_task
        from dqbart.teacher import load_teacher

        teacher, tokenizer, known = load_teacher(self.args.teacher, None, self.args.device)
        stages = self.recipe.stages()
        as_long = dict(max_steps=len(stages) * self.args.steps)
        recipe = resolve(type(self.recipe).from_dict(self.recipe.to_dict() | as_long), teacher.config, known)
        task = open_task(recipe, tokenizer, teacher, self.args.teacher)
        train, dev = task.read(str(self.args.data), None)
        student = self.whole(trained=False).to(teacher.device)
        for model in (teacher, student):
            use_attention(model)
        folder = self.folder / f"alone-{width:g}-{depth:g}"
        rows, collator = task.training_set(train, teacher, folder)
        subset = None if dev is None else sample(dev, recipe.dev_subset)
        trainer.train(
            trainer.DistillationTrainer(
                model=student.requires_grad_(True), teacher=teacher, train_dataset=rows, data_collator=collator,
                objective=ElasticObjective(Stage(weights=stages[-1].terms, widths=(width,), depths=(depth,))),
                args=trainer.training_arguments(recipe, folder, len(rows), self.args.device),
                dev_score=None if subset is None
                else (lambda model: task.score(subnetwork(model, width, depth), subset).score),
            )
        )  # fmt: skip
        return student

    def row(self, how: str, width: float, depth: float) -> dict[str, Any]:
        """Test score and parameters of one part."""
        from dqbart.fitting import resolve
        from dqbart.student.width import subnetwork
        from dqbart.tasks import open_task
        from dqbart.teacher import load_teacher

        teacher, tokenizer, known = load_teacher(self.args.teacher, None, self.args.device)
        network = self.alone(width, depth) if how == "alone" else self.whole(trained=how == "dynabert")
        part = subnetwork(network.to(teacher.device), width, depth).eval()
        task = open_task(resolve(self.recipe, teacher.config, known), tokenizer, teacher, self.args.teacher)
        score = task.score(part, task.read_split(str(self.args.data), "test")).score
        return {"parameters": part.num_parameters(), "metric": score.metric, "score": round(score.value, 3)}


UNTRAINED = dict(epochs=0.0, max_steps=0)


def table(rows: list[dict[str, Any]]) -> str:
    """A table a study. One line a sub-network, smallest last; brackets: what training all at once costs or gains it."""
    studies = dict.fromkeys(tuple(row[key] for key in STUDY) for row in rows)
    parts = []
    for study in studies:
        teacher, data, steps, rate, widths, depths = study
        words = f"{teacher} on {data}, {steps:,} steps a stage, widths {widths}, depths {depths}"
        words += f", learning rate {rate:g}" if rate else ""
        own = [row for row in rows if tuple(row[key] for key in STUDY) == study]
        parts.append(f"{words}:\n\n{_table_of(own)}")
    return "\n\n".join(parts)


def _table_of(rows: list[dict[str, Any]]) -> str:
    lines = []
    for depth, width in sorted({(row["depth"], row["width"]) for row in rows}, reverse=True):
        own = [row for row in rows if (row["depth"], row["width"]) == (depth, width)]
        means = {how: [row["score"] for row in own if row["how"] == how] for how in HOW}
        cells = [_mean(means[how]) for how in HOW]
        if means["alone"] and means["dynabert"]:
            cells[-1] += f" ({statistics.fmean(means['dynabert']) - statistics.fmean(means['alone']):+.1f})"
        lines.append([f"{width:g}", f"{depth:g}", f"{own[0]['parameters'] / 1e6:.2f}", *cells])
    return markdown(["width", "depth", "parameters, M", "cut, untrained", "trained alone", "trained at once"], lines)


def _mean(scores: list[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.1f}{spread}" if scores else ""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("teacher", help="folder of a fine-tuned encoder")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the set that it was fine-tuned on")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where networks are kept (a temporary folder)")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="of each of the two stages (1500)")
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="as the recipe says")
    parser.add_argument("--widths", type=float, nargs="+", default=list(WIDTHS), metavar="SHARE")
    parser.add_argument("--depths", type=float, nargs="+", default=list(DEPTHS), metavar="SHARE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[28], metavar="N")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--quick", action="store_true", help="two sub-networks, two steps, and no file unless --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (results/subnetworks.json)")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


@resumable
def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        args.work = args.work or Path(scratch)
        ledger = Ledger(args.out or (Path(scratch) if args.quick else RESULTS) / "subnetworks.json", KEYS)
        shares = [" ".join(f"{share:g}" for share in sorted(given)) for given in (args.widths, args.depths)]
        study = (Path(args.teacher).name, args.data.name, args.steps, args.learning_rate, *shares)
        files = f"{fingerprint(Path(args.teacher), *CHECKPOINT)}, {fingerprint(args.data)}"
        require_same_files(ledger, (row for row in ledger.rows if (row["teacher"], row["data"]) == study[:2]), files)
        for seed, how, depth, width in product(args.seeds, HOW, args.depths, args.widths):
            key = dict(zip(KEYS, (*study, how, width, depth, seed), strict=True))
            if ledger.find(**key) is None:
                ledger.add(key | {"files": files} | Study(args, seed).row(how, width, depth))
    print(table(ledger.rows))
    print(json.dumps({"rows": len(ledger.rows)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
