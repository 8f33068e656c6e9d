"""The training loop: transformers' Seq2SeqTrainer with a teacher, and what a long run needs to survive.

What is changed, and why (integration.md, section 3):
- `compute_loss` is the distillation objective. `model_accepts_loss_kwargs` is False: BART's forward takes **kwargs, so
  Trainer would believe that it normalises the loss over accumulated batches, which it does not.
- The teacher is a plain attribute: it is in no state dict, no optimizer and no DDP wrapper.
- Dev decoding runs in eval mode with the same quantized arithmetic as the packed model; the best student so far is kept
  in `best/`, apart from the resume checkpoints, so that a checkpoint every few minutes costs no selection.
- Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops; the same command goes on from there, to the same
  weights bit for bit. So the order of examples follows from seed and epoch: Trainer draws it from the global random
  state, which a run resumed within a later epoch does not have.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from dqbart.recipe import Recipe

# Scores one student on the dev subset: a `dqbart.evaluation.metrics.Score`, whose `value` counts.
DevScore = Callable[[Any], Any]


def training_arguments(recipe: Recipe, folder: Path, examples: int, device: str | None) -> Seq2SeqTrainingArguments:
    """Trainer's arguments for a resolved recipe; checkpoints go to `folder/checkpoints`."""
    batch = recipe.batch_size * recipe.gradient_accumulation * max(1, _world_size())
    steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * math.ceil(examples / batch)))
    every = max(1, math.ceil(steps / recipe.evaluations)) if recipe.evaluations else 0
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate or 0.0,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(recipe.warmup_ratio * steps),
        bf16=recipe.bf16,
        seed=recipe.seed,
        eval_steps=every,  # read by `Progress`, 0: never; Trainer's own strategy wants a dataset to evaluate on
        save_strategy="steps",
        save_steps=max(1, min(every or steps, max(25, steps // 20))),
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=max(1, steps // 100),
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=not {"task", "logits"} & set(recipe.terms),  # they use every parameter
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu" or not torch.cuda.is_available(),  # unsaid, Trainer wants a GPU for bf16
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several and no torchrun: Trainer would use nn.DataParallel
    return arguments


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class DistillationTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer whose loss compares `model` with `teacher`; see the module's docstring."""

    control: Any

    def __init__(
        self,
        *,
        model: Any,
        teacher: Any,
        objective: Any,
        args: Seq2SeqTrainingArguments,
        train_dataset: Any,
        data_collator: Any,
        dev_score: DevScore | None = None,
    ) -> None:
        objective.begin(model)  # before there is an optimizer
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=data_collator)
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        self.objective = objective
        self.dev_score = dev_score
        self.folder = Path(args.output_dir).parent
        self._sums: dict[str, Tensor] = {}
        self._seen = [0, 0]  # micro-batches and tokens since the last log line
        self._read = ("input_ids", "labels") if model.config.is_encoder_decoder else ("input_ids",)
        self.order = torch.Generator()  # of examples; Progress seeds it at each epoch
        self.remove_callback(PrinterCallback)
        self.add_callback(Progress(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        sampler.generator = self.order
        return sampler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        total, terms, output = self.objective(model, self.teacher, inputs, self.accelerator.unwrap_model(model))
        for name, term in (terms | {"loss": total}).items():
            self._sums[name] = self._sums.get(name, 0) + term.detach()
        self._seen[0] += 1
        self._seen[1] += sum(inputs[name].numel() for name in self._read)
        return (total, output) if return_outputs else total

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Decode the dev subset (first process only), keep the student if it is the best so far."""
        student = self.accelerator.unwrap_model(self.model)
        scores: dict[str, float] = {}
        if self.dev_score is not None and self.is_world_process_zero():
            found = self.dev_score(student)
            scores = {k: round(v, 3) for k, v in found.values.items()}
            self._keep_if_best(student, scores, found.value)
            self._record({"step": self.state.global_step, "dev": scores})
        self.accelerator.wait_for_everyone()
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in scores.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _keep_if_best(self, student: Any, scores: dict[str, float], value: float) -> None:
        best, aside = self.folder / "best", self.folder / "best.partial"
        if value > (_best(best) or {"value": -math.inf})["value"]:
            shutil.rmtree(aside, ignore_errors=True)
            student.save_pretrained(aside)
            found = {"step": self.state.global_step, "scores": scores, "value": value}
            (aside / "dev.json").write_text(json.dumps(found), encoding="utf-8")
            shutil.rmtree(best, ignore_errors=True)
            os.replace(aside, best)

    def _record(self, row: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drop the best student and the log of steps that will be done again, and a line that a crash cut short."""
        best = _best(self.folder / "best")
        if best is None or best["step"] > step:
            shutil.rmtree(self.folder / "best", ignore_errors=True)
        log = self.folder / "metrics.jsonl"
        if log.exists():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines(True) if line.endswith("}\n")]
            log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")

    def means(self) -> dict[str, float]:
        """Mean of every loss term since the last call, and tokens seen; resets both."""
        count, tokens = self._seen
        values = {k: float(v) / max(1, count) for k, v in self._sums.items()} | {"tokens": float(tokens)}
        self._sums, self._seen = {}, [0, 0]
        return values


class Progress(TrainerCallback):
    """One line on stderr per log step: step, loss and its terms, tokens per second, time left."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        self.start = (0, 0.0)
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.perf_counter()
        self.start = (state.global_step, self.last)
        if state.is_world_process_zero:
            self.trainer._forget_after(state.global_step)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        self.trainer.order.manual_seed(args.seed + epoch)
        if hasattr(self.trainer.train_dataset, "set_epoch"):  # accelerate leaves that to the sampler, if that has it
            self.trainer.train_dataset.set_epoch(epoch)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        means, now = self.trainer.means(), time.perf_counter()
        tokens, loss = means.pop("tokens"), means.pop("loss", math.nan)
        done = state.global_step - self.start[0]
        left = (now - self.start[1]) / max(1, done) * (state.max_steps - state.global_step)
        terms = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        print(
            f"step {state.global_step}/{state.max_steps}  loss {loss:.4g}  ({terms})  "
            f"{tokens / max(1e-9, now - self.last):,.0f} tokens/s  {left // 60:.0f} min {left % 60:02.0f} s left",
            file=sys.stderr,
            flush=True,
        )
        self.last = now
        self.trainer._record({"step": state.global_step, "loss": loss, "lr": logs.get("learning_rate"), **means})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        chooses = self.trainer.dev_score is not None and args.eval_steps > 0
        last = state.global_step == state.max_steps
        control.should_evaluate = chooses and (last or state.global_step % args.eval_steps == 0)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if metrics and state.is_world_process_zero:
            scores = "  ".join(f"{k.removeprefix('eval_')} {v:.2f}" for k, v in metrics.items())
            print(f"step {state.global_step}/{state.max_steps}  dev: {scores}", file=sys.stderr, flush=True)
        self.last = time.perf_counter()


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM inside `with`: finish the step, save, stop all processes. A second one stops at once."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer
        self.caught = self.stopped = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        try:
            self.before = {n: signal.signal(n, self._catch) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # only the main thread may set handlers; elsewhere the caller's stay
            self.before = {}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True
        print("stopping after this step; a checkpoint is saved, the same command goes on", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.caught:
            self.trainer.accelerator.set_trigger()
        if self.trainer.accelerator.check_trigger():  # processes are signalled at different moments
            self.stopped = control.should_save = control.should_training_stop = True
        return control


def _best(folder: Path) -> dict[str, Any] | None:
    """Step and score of a kept student."""
    try:
        found: dict[str, Any] = json.loads((folder / "dev.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest checkpoint that is whole: its trainer_state.json is written last. Newer ones that
    a full disk or a kill cut short are deleted, or Trainer would count them among those to keep."""
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    for step, path in sorted(found.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return step, path
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return None


def train(trainer: DistillationTrainer) -> None:
    """Train to the end, from the last checkpoint if there is one; then load the best student into the model.

    Raises `KeyboardInterrupt`, with a checkpoint saved, if it was told to stop.
    """
    step, last = _last_checkpoint(Path(trainer.args.output_dir)) or (0, None)
    if last is not None and step >= trainer.args.max_steps:
        load_weights(trainer.model, last)  # done before; Trainer would do one more step
    else:
        _train(trainer, last)
    student = trainer.accelerator.unwrap_model(trainer.model)
    for name in ("forward", "_original_forward"):  # accelerate's autocast, if bf16: packing compares with fp32
        vars(student).pop(name, None)
    best = trainer.folder / "best"
    if best.is_dir():
        load_weights(student, best)
    trainer.objective.finish(student)


def _train(trainer: DistillationTrainer, last: Path | None) -> None:
    if last is not None:
        print(f"resuming from {last}", file=sys.stderr, flush=True)
    stop = StopOnSignal(trainer)
    trainer.add_callback(stop)
    with stop:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if stop.stopped:
        raise KeyboardInterrupt


def load_weights(model: Any, folder: Path) -> None:
    """Copy a saved student's tensors into `model`, which has the same names and shapes."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise ValueError(f"{folder}: tensors {unexpected or sorted(set(missing) - tied)} don't fit the student")
