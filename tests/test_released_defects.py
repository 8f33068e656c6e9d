"""Defects of the released code of TinyBERT, TextBrewer and MiniLMv2's reruns (methods.md, sections 3, 4 and 6): each
test fails on code that has them. Those of augmentation stand in test_augmentation.py, DynaBERT's in test_elastic.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_encoder_objective import masked, pair, terms_of
from tiny_models import tiny_encoder, token_batch
from torch.nn import functional as F
from transformers import TrainerCallback

from dqbart.data.batches import Collator
from dqbart.distill import losses
from dqbart.distill.trainer import DistillationTrainer, train, training_arguments
from dqbart.fitting import resolve
from dqbart.methods import only
from dqbart.recipe import Recipe


def items(count: int = 20) -> list[dict[str, list[int]]]:
    rows = token_batch([5 + i % 4 for i in range(count)], seed=1)["input_ids"].tolist()
    return [
        {"input_ids": row[: 5 + i % 4], "attention_mask": [1] * (5 + i % 4), "labels": row[: 5 + i % 4]}
        for i, row in enumerate(rows)
    ]


class Watch(TrainerCallback):
    def __init__(self, *models: Any) -> None:
        self.models, self.seen = models, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(tuple(model.training for model in self.models))


def test_the_teacher_does_not_drop_anything_while_the_student_trains(tmp_path: Path) -> None:
    """TinyBERT, both stages: its teacher is in train mode, so targets are noise."""
    recipe = Recipe(task="text", method="tinybert", layer_map="top", max_steps=3, batch_size=4, evaluations=0)
    recipe = resolve(recipe, tiny_encoder("bert").config, "text")
    teacher = tiny_encoder("bert")
    for module in teacher.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    student, teacher, objective = pair(recipe, teacher=teacher.train())
    rows = items()
    trainer = DistillationTrainer(
        model=student, teacher=teacher, objective=objective, args=training_arguments(recipe, tmp_path, 20, "cpu"),
        train_dataset=rows, data_collator=Collator(1),
    )  # fmt: skip
    watch = Watch(teacher, student)
    trainer.add_callback(watch)
    train(trainer)
    assert watch.seen == [(False, True)] * 3
    batch = masked([6, 5])
    student.eval()
    assert terms_of(objective, student, teacher, batch) == terms_of(objective, student, teacher, batch)


def test_every_stage_has_its_own_epochs_and_lengths_are_the_users(tmp_path: Path) -> None:
    """TinyBERT: a misspelt argument leaves per-task epochs dead and overrides --max_seq_length."""
    recipe = Recipe(method="tinybert", task="classification", epochs=4, prediction_epochs=1.5, max_source_length=40)
    recipe = resolve(recipe, tiny_encoder("bert").config, "classification")
    steps = [training_arguments(stage, tmp_path, 64, "cpu").max_steps for stage in recipe.stages()]
    assert steps == [8, 3] and recipe.max_source_length == 40
    assert all(stage.max_source_length == 40 for stage in recipe.stages())


def test_scores_count_whatever_their_value() -> None:
    """TextBrewer zeroes every attention score below -1e-3, TinyBERT every one below -100, padding or not."""
    student = torch.full((1, 2, 3, 3), -0.5)
    teacher = torch.full((1, 2, 3, 3), -200.0)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert float(losses.attention_mse(student, teacher, mask, mask)) == pytest.approx(199.5**2)
    as_released = [x.masked_fill(x <= -100, 0) for x in (student, teacher)]
    assert float(F.mse_loss(*as_released)) == pytest.approx(0.25)


def test_padding_has_no_part_in_attention_losses() -> None:
    """Both leave padded keys in their means; a masked score is a huge number that differs by model."""
    mask = torch.tensor([[True, True, False]])
    student, teacher = torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
    lowest = torch.finfo(torch.float32).min
    student[..., 2], teacher[..., 2] = lowest, -float("inf")
    found = losses.attention_mse(student.requires_grad_(), teacher, mask, mask)
    assert float(found.detach()) == 1.0
    found.backward()
    assert torch.isfinite(student.grad).all() and (student.grad[..., 2] == 0).all()  # type: ignore[union-attr, index]


def test_temperature_does_not_weaken_the_gradient() -> None:
    """TextBrewer's soft targets lack T^2, with T = 4 by default: a sixteenth of the gradient is left."""
    torch.manual_seed(0)
    teacher, sizes = torch.randn(1, 6, 50), []
    for temperature in (1.0, 4.0, 8.0):
        student = (0.05 * torch.randn(1, 6, 50)).requires_grad_()
        losses.logits_kl(student, teacher, torch.ones(1, 6, dtype=torch.bool), temperature).backward()
        sizes.append(float(student.grad.norm()))  # type: ignore[union-attr]
    assert 0.5 < sizes[1] / sizes[0] < 2 and 0.9 < sizes[2] / sizes[1] < 1.1


def test_the_prediction_loss_is_no_smaller_for_many_classes() -> None:
    """TinyBERT's is a mean over classes, too: with 150 intents a hundredth and less of a label's cross-entropy."""
    for classes in (2, 150):
        z = torch.zeros(4, 1, classes)
        teacher = F.one_hot(torch.tensor([0, 1, 0, 1]), classes).float()[:, None] * 50
        found = losses.logits_kl(z, teacher, torch.ones(4, 1, dtype=torch.bool))
        assert float(found) == pytest.approx(torch.tensor(float(classes)).log().item(), rel=1e-4)


@torch.no_grad()
def test_relations_are_those_of_the_layer_as_it_runs() -> None:
    """Reruns of MiniLMv2 compute queries, keys and values again from hidden states and float weights; a quantized
    student's are others."""
    recipe = Recipe(task="text", losses=only(queries=1.0), relation_heads=4)
    student, teacher, objective = pair(recipe, layers=2, quantize="2-2-8")
    batch = masked([8, 6])
    found = terms_of(objective, student, teacher, batch)["queries"]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    ours, theirs = (m(**inputs, output_hidden_states=True).hidden_states for m in (student, teacher))
    mask = batch["attention_mask"].bool()
    layers = student.bert.encoder.layer[1].attention.self, teacher.bert.encoder.layer[2].attention.self
    as_run = losses.relation_kl(layers[0].query(ours[1]), layers[1].query(theirs[2]), mask, 4)
    in_float = losses.relation_kl(
        F.linear(ours[1], layers[0].query.weight, layers[0].query.bias), layers[1].query(theirs[2]), mask, 4
    )
    assert found == pytest.approx(float(as_run), rel=1e-4)
    assert abs(found - float(in_float)) > 0.01 * found


def test_no_relation_of_padding() -> None:
    x, y = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    whole = losses.relation_kl(x, y, mask, 3)
    apart = [losses.relation_kl(x[:1, :4], y[:1, :4], mask[:1, :4], 3), losses.relation_kl(x[1:], y[1:], mask[1:], 3)]
    assert float(whole) == pytest.approx(float(sum(apart)) / 2, rel=1e-5)


def test_logs_name_every_term(tmp_path: Path) -> None:
    """TinyBERT logs sums over two kinds of loss; here each term has its own name and weight."""
    recipe = Recipe(task="text", method="tinybert", layer_map="top", max_steps=2, batch_size=4, evaluations=0)
    recipe = resolve(recipe, tiny_encoder("bert").config, "text")
    student, teacher, objective = pair(recipe)
    train(
        DistillationTrainer(
            model=student, teacher=teacher, objective=objective, args=training_arguments(recipe, tmp_path, 20, "cpu"),
            train_dataset=items(), data_collator=Collator(1),
        )
    )  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"embedding", "hidden", "scores", "loss"} <= log[0].keys()
