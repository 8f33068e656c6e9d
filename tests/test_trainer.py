"""The training loop on tiny models: interrupted and resumed, accumulated, in bf16, and over two processes."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_two_processes
from tiny_models import tiny_encoder, tiny_seq2seq, token_batch
from torch import Tensor
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from dqbart.data.batches import Collator
from dqbart.distill import trainer as module
from dqbart.distill.dropout import dropping
from dqbart.distill.objective import Objective
from dqbart.distill.trainer import DistillationTrainer, load_weights, train, training_arguments
from dqbart.evaluation.metrics import Score
from dqbart.notation import Layers
from dqbart.quant.attention import use_attention
from dqbart.quant.layers import prepare
from dqbart.recipe import LossWeights, Recipe
from dqbart.student.depth import make_student, stack_maps

FEW = LossWeights(encoder_attention=1.0, decoder_hidden=0.5)
SMALL = dict(
    bits="2-2-8", layers="1-1", losses=FEW, learning_rate=5e-3, batch_size=4, max_steps=12, evaluations=4, bf16=False
)


def examples(count: int = 26, equal: bool = False) -> list[dict[str, list[int]]]:
    lengths = [6] * count if equal else [3 + i % 7 for i in range(count)]
    sources = token_batch(lengths, seed=1)["input_ids"].tolist()
    return [
        {"input_ids": row[:n], "attention_mask": [1] * n, "labels": row[:n][::-1]}
        for row, n in zip(sources, lengths, strict=True)
    ]


def rouge(**values: float) -> Score:
    return Score("rouge", values, {}, 1, "en", "made up", {})


def make(
    folder: Path, dev_score: Any = None, data: Any = None, dropout: float = 0.2, prepared: bool = True, **changes: Any
) -> DistillationTrainer:
    recipe = Recipe(**(SMALL | changes))
    teacher = tiny_seq2seq("bart", 2, 2, dropout=dropout, attention_dropout=dropout)
    student = make_student(teacher, recipe.layers)  # type: ignore[arg-type]
    use_attention(teacher)
    use_attention(student)
    if prepared:
        prepare(student, recipe.bits)
    data = examples() if data is None else data
    return DistillationTrainer(
        model=student, teacher=teacher, objective=Objective(recipe, stack_maps(teacher.config, Layers("1-1"))),
        args=training_arguments(recipe, folder, len(data), "cpu"), train_dataset=data, data_collator=Collator(1),
        dev_score=dev_score,
    )  # fmt: skip


def state(trainer: DistillationTrainer) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signal handlers are the caller's again after every run, however it ended."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class At(TrainerCallback):
    """Do something when a step begins or ends."""

    def __init__(self, step: int, action: Callable[[], None], begin: bool = False) -> None:
        self.step, self.action, self.begin = step, action, begin

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begin and state.global_step == self.step:
            self.action()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.begin and state.global_step == self.step:
            self.action()


def crash() -> None:
    raise RuntimeError("power cut")


# Interrupted and resumed.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    trainer = make(tmp_path_factory.mktemp("whole"), gradient_accumulation=2)
    before = state(trainer)
    train(trainer)
    assert not same(before, state(trainer)) and trainer.state.global_step == 12
    return state(trainer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.parametrize("step", [2, 3, 8])
def test_stopped_by_a_signal_and_run_again(
    step: int, number: int, tmp_path: Path, uninterrupted: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    """26 examples in batches of 4 x 2 make 4 steps an epoch: within the first, at its end, and within the third."""
    first = make(tmp_path, gradient_accumulation=2)
    first.add_callback(At(step, lambda: os.kill(os.getpid(), number), begin=True))
    with pytest.raises(KeyboardInterrupt):
        train(first)
    assert first.state.global_step == step + 1 and (tmp_path / "checkpoints" / f"checkpoint-{step + 1}").is_dir()
    assert "stopping after this step; a checkpoint is saved, the same command goes on" in capsys.readouterr().err
    second = make(tmp_path, gradient_accumulation=2)
    train(second)
    assert f"resuming from {tmp_path}/checkpoints/checkpoint-{step + 1}" in capsys.readouterr().err
    assert same(state(second), uninterrupted)


def test_killed_between_checkpoints_and_run_again(tmp_path: Path, uninterrupted: dict[str, Tensor]) -> None:
    first = make(tmp_path, gradient_accumulation=2)
    first.add_callback(At(8, crash))
    with pytest.raises(RuntimeError, match="power cut"):
        train(first)
    assert (tmp_path / "checkpoints" / "checkpoint-6").is_dir()  # every third step, the latest one is kept
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 8))
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 8, "lo')
    second = make(tmp_path, gradient_accumulation=2)
    torch.randn(17)  # nothing that is drawn before the start matters
    train(second)
    assert same(state(second), uninterrupted)
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, 13))
    third = make(tmp_path, gradient_accumulation=2)  # done already: trained no further
    train(third)
    assert same(state(third), uninterrupted)


@pytest.mark.parametrize("cut", ["no state", "half a state", "empty, the last step"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path: Path, cut: str) -> None:
    """A full disk or a kill while saving: the one before it is whole."""

    def dev_score(model: Any) -> Score:
        return rouge(rougeL=1.0)

    trainer = make(tmp_path / "cut", dev_score)
    trainer.add_callback(At(6, lambda: os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    checkpoints = tmp_path / "cut" / "checkpoints"
    bad = checkpoints / f"checkpoint-{12 if 'last' in cut else 9}"
    bad.mkdir()
    if cut == "half a state":
        (bad / "trainer_state.json").write_text('{"global_step": 9, "max_st')
    (tmp_path / "cut" / "best" / "dev.json").write_text("")
    resumed = make(tmp_path / "cut", dev_score)
    train(resumed)
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-12"]
    assert json.loads((tmp_path / "cut" / "best" / "dev.json").read_text())["value"] == 1
    assert [row["step"] for row in rows(tmp_path / "cut") if "loss" in row] == list(range(1, 13))


def test_the_best_student_of_a_training_that_is_done_again_is_forgotten(tmp_path: Path) -> None:
    train(make(tmp_path, lambda model: rouge(rougeL=50.0)))
    for folder in (tmp_path / "checkpoints").iterdir():
        shutil.rmtree(folder)
    again = make(tmp_path, lambda model: rouge(rougeL=1.0))
    train(again)
    assert json.loads((tmp_path / "best" / "dev.json").read_text())["value"] == 1


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    trainer = make(tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.add_callback(At(1, twice, begin=True))
    with pytest.raises(KeyboardInterrupt):
        train(trainer)
    assert trainer.state.global_step == 1 and not (tmp_path / "checkpoints" / "checkpoint-2").exists()


# What is trained, and on what.


def test_accumulation_is_one_big_batch(tmp_path: Path) -> None:
    """BART's forward takes **kwargs, from which Trainer would conclude that the loss needs no division."""
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        folder = tmp_path / str(size)
        changes = dict(batch_size=size, gradient_accumulation=accumulation, max_steps=2, max_grad_norm=0.0)
        trainer = make(folder, data=examples(16, equal=True), dropout=0.0, prepared=False, **changes)
        train(trainer)
        found.append((state(trainer), [r["loss"] for r in rows(folder)], trainer.state.log_history[0]["grad_norm"]))
    (one, losses, norm), (other, accumulated, accumulated_norm) = found
    assert accumulated == pytest.approx(losses, rel=1e-4) and accumulated_norm == pytest.approx(norm, rel=1e-3)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3)


def test_codes_are_those_of_the_trained_weights(tmp_path: Path) -> None:
    """Trainer's default optimizer is fused and raises no tensor version: cached codes would stay the first ones."""
    seen: list[float] = []

    def dev_score(model: Any) -> Score:
        with torch.no_grad():
            for m in model.modules():
                if hasattr(m, "quantized_weight"):
                    codes, scale = m.codes()
                    expected = m.quantized_weight.quantizer.quantize(m.weight)
                    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
        seen.append(1.0)
        return rouge(rougeL=float(len(seen)))

    trainer = make(tmp_path, dev_score, dropout=0.0, learning_rate=2e-2, max_steps=30)
    assert trainer.args.optim == "adamw_torch_fused"
    train(trainer)
    losses = [r["loss"] for r in rows(tmp_path) if "loss" in r]
    assert len(seen) == 4 and len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_teacher_stays_out_of_it(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2)
    teacher = trainer.teacher
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    checks: list[bool] = []
    trainer.add_callback(At(1, lambda: checks.append(teacher.training or not trainer.model.training), begin=True))
    train(trainer)
    assert checks == [False] and not teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}
    assert not any(m is teacher for m in trainer.model.modules())
    saved = next((tmp_path / "checkpoints").glob("checkpoint-2/*.safetensors"))
    from safetensors import safe_open

    with safe_open(saved, "pt") as file:
        assert set(file.keys()) <= set(trainer.model.state_dict())


def test_no_evaluations_keep_the_last_student(tmp_path: Path) -> None:
    asked: list[int] = []
    trainer = make(tmp_path, dev_score=lambda student: asked.append(1), evaluations=0, max_steps=5)
    train(trainer)
    assert asked == [] and trainer.state.global_step == 5 and not (tmp_path / "best").exists()
    assert not any("dev" in row for row in rows(tmp_path))


def test_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(layers="1-1", learning_rate=1e-3, epochs=3, batch_size=4, gradient_accumulation=2, warmup_ratio=0.1)
    arguments = training_arguments(recipe, tmp_path, 26, "cpu")
    assert (arguments.max_steps, arguments.warmup_steps, arguments.eval_steps) == (12, 2, 3)
    assert training_arguments(Recipe(layers="1-1", epochs=0.1), tmp_path, 1000, "cpu").max_steps == 4
    assert training_arguments(Recipe(layers="1-1", max_steps=7, epochs=50), tmp_path, 9, "cpu").max_steps == 7
    never = training_arguments(Recipe(layers="1-1", evaluations=0), tmp_path, 320, "cpu")
    assert (never.max_steps, never.eval_steps, never.save_steps) == (30, 0, 25)
    monkeypatch.setattr(module, "_world_size", lambda: 2)
    assert training_arguments(recipe, tmp_path, 26, "cpu").max_steps == 6


def test_two_gpus_and_no_torchrun_train_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer would take both, in threads (nn.DataParallel), and twice the batch."""

    def setup(self: Any) -> Any:
        self._n_gpu = 2
        return torch.device("cuda:0")

    monkeypatch.setattr(Seq2SeqTrainingArguments, "_setup_devices", property(setup))
    arguments = training_arguments(Recipe(batch_size=4), tmp_path, 26, "cuda")
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)


@pytest.mark.parametrize("kind", ["bart", "mbart", "bert", "roberta", "distilbert", "albert"])
def test_dropout_of_a_recipe_is_that_of_training_alone(kind: str) -> None:
    model = tiny_seq2seq(kind) if "bart" in kind else tiny_encoder(kind)
    batch = token_batch([6, 4])
    more = {"decoder_input_ids": batch["input_ids"]} if "bart" in kind else {}

    def differs() -> bool:
        with torch.no_grad():
            one, two = (model.train()(**batch, **more).logits for _ in range(2))
        return not torch.equal(one, two)

    for rate, expected in ((0.5, True), (0.0, False)):
        with dropping(model, rate):
            assert differs() == expected
    with dropping(model, 0.5):
        with dropping(model, None):
            assert differs()
        with pytest.raises(RuntimeError), dropping(model, 0.0):
            raise RuntimeError
        assert differs()  # as before, after an error too


def test_bf16_without_a_gpu_and_no_device_named(tmp_path: Path) -> None:
    arguments = training_arguments(Recipe(bf16=True), tmp_path, 26, None)  # transformers would refuse it
    assert arguments.bf16 and arguments.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_bf16_leaves_a_student_as_it_came(tmp_path: Path) -> None:
    trainer = make(tmp_path, bf16=True, max_steps=3)
    train(trainer)
    student = trainer.accelerator.unwrap_model(trainer.model)
    batch = token_batch([6, 4])
    student.eval()
    with torch.no_grad():
        logits = student(**batch, decoder_input_ids=batch["input_ids"]).logits
    assert logits.isfinite().all() and student.dtype == torch.float32
    assert "forward" not in vars(student)  # accelerate's autocast wrapper is gone: packing sees fp32 arithmetic


# Selection and the log.


def test_the_best_student_is_kept_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, kept = iter([20.0, 31.25, 31.25, 7.0]), []

    def dev_score(model: Any) -> Score:
        kept.append({k: v.detach().clone() for k, v in model.state_dict().items()})
        return rouge(rouge1=50.0, rougeL=next(scores))

    trainer = make(tmp_path, dev_score)
    train(trainer)
    assert json.loads((tmp_path / "best" / "dev.json").read_text()) == {
        "step": 6, "scores": {"rouge1": 50.0, "rougeL": 31.25}, "value": 31.25,
    }  # fmt: skip
    assert same(state(trainer), kept[1]) and not same(kept[1], kept[3])
    plain = type(trainer.model).from_pretrained(tmp_path / "best")
    assert same(plain.state_dict(), kept[1])
    log = rows(tmp_path)
    assert [(r["step"], r["dev"]["rougeL"]) for r in log if "dev" in r] == [
        (3, 20.0),
        (6, 31.25),
        (9, 31.25),
        (12, 7.0),
    ]
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert set(steps[0]) == {"step", "loss", "lr", "task", "logits", "encoder_attention", "decoder_hidden"}
    for r in steps:
        total = 0.2 * r["task"] + r["logits"] + r["encoder_attention"] + 0.5 * r["decoder_hidden"]
        assert r["loss"] == pytest.approx(total, rel=1e-4)
    shown = capsys.readouterr()
    assert "step 12/12  loss" in shown.err and "tokens/s" in shown.err and "0 min 00 s left" in shown.err
    assert "step 6/12  dev: rouge1 50.00  rougeL 31.25" in shown.err and shown.out == ""


def test_speed_counts_what_is_read(tmp_path: Path) -> None:
    """Source and target; of an encoder its input, whose labels are no text of their own."""

    class Nothing:
        def begin(self, model: Any) -> None: ...

        def __call__(self, *_: Any) -> Any:
            return torch.zeros(()), {}, None

    batch = {"input_ids": torch.zeros(2, 7), "labels": torch.zeros(2, 5)}
    for model, count in ((tiny_seq2seq("bart"), 24), (tiny_encoder("bert"), 14)):
        found = DistillationTrainer(
            model=model, teacher=model, objective=Nothing(), train_dataset=examples(),
            args=training_arguments(Recipe(**SMALL), tmp_path, 9, "cpu"), data_collator=Collator(1),
        )  # fmt: skip
        found.compute_loss(model, batch)
        assert found.means()["tokens"] == count


def test_the_best_score_survives_a_restart(tmp_path: Path) -> None:
    first = make(tmp_path, lambda model: rouge(rougeL=40.0))
    first.add_callback(At(4, lambda: os.kill(os.getpid(), signal.SIGINT), begin=True))
    with pytest.raises(KeyboardInterrupt):
        train(first)
    second = make(tmp_path, lambda model: rouge(rougeL=30.0))
    train(second)
    assert json.loads((tmp_path / "best" / "dev.json").read_text())["step"] == 3
    log = [r for r in rows(tmp_path) if "dev" in r]
    assert [(r["step"], r["dev"]["rougeL"]) for r in log] == [(3, 40.0), (6, 30.0), (9, 30.0), (12, 30.0)]


def test_loading_refuses_what_does_not_fit(tmp_path: Path) -> None:
    tiny_seq2seq("bart", 1, 2).save_pretrained(tmp_path / "deeper")
    tiny_seq2seq("bart", 1, 1).model.encoder.save_pretrained(tmp_path / "encoder")
    model = tiny_seq2seq("bart", 1, 1)
    with pytest.raises(ValueError, match="deeper: tensors .*decoder.layers.1.* don't fit the student"):
        load_weights(model, tmp_path / "deeper")
    with pytest.raises(ValueError, match="encoder: tensors .* don't fit the student"):
        load_weights(model, tmp_path / "encoder")


# Two processes.

WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from test_trainer import At, make, rouge, train
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

def run(name, stop=False):
    trainer = make(folder / name, lambda model: rouge(rougeL=1.0), batch_size=2, max_steps=5)
    if stop and rank == 1:  # the other process must not wait for it forever
        trainer.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGINT), begin=True))
    train(trainer)
    assert trainer.args.world_size == 2 and trainer.state.global_step == 5
    torch.save(trainer.model.state_dict(), folder / name / f"rank{rank}.pt")

run("whole")
try:
    run("stopped", stop=True)
except KeyboardInterrupt:
    run("stopped")
"""


def test_two_processes_end_with_equal_weights(tmp_path: Path) -> None:
    said = in_two_processes(WORKER, tmp_path)
    for name in ("whole", "stopped"):
        assert [r["step"] for r in rows(tmp_path / name) if "dev" in r] == [2, 4, 5]  # written by one of them
    assert "resuming from" in said
    states = [torch.load(tmp_path / name / f"rank{r}.pt") for name in ("whole", "stopped") for r in (0, 1)]
    assert all(same(states[0], other) for other in states[1:])
