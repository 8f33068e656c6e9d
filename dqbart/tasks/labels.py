"""One text, or two, and a class or a number: sentiment, intent, entailment, acceptability, similarity."""

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

from dqbart.data.files import load_rows
from dqbart.data.labelled import LabelCollator, Labelled, encode_labelled, guess_label_columns, read_labelled
from dqbart.data.labels import unnamed
from dqbart.data.splits import data_name
from dqbart.evaluation.label_metrics import score_labels
from dqbart.evaluation.predict import predict_logits
from dqbart.recipe import Recipe
from dqbart.student.sharing import shared_model
from dqbart.tasks import HIDDEN, PROBES, Outcome, Task


class Labels(Task):
    """Classification and regression, through transformers' `...ForSequenceClassification`.

    Classes are named as the teacher names them; where its head was made up for the occasion, as the training split
    does, and the head gets as many.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, config: Any) -> None:
        super().__init__(recipe, tokenizer)
        self.collator = LabelCollator(tokenizer.pad_token_id)
        self.names: list[str] | None = None
        if has_head(config):
            self._check(config)  # before any data is read with it
        if recipe.task == "classification" and has_head(config):
            self.names = class_names(config)

    def read(self, data: Any, dev_data: Any) -> tuple[Labelled | None, Labelled | None]:
        train, dev = super().read(data, dev_data)
        asked = self.recipe.trains and any("task" in stage.terms for stage in self.recipe.stages())
        if asked and train is not None and train.labels is None:
            why = HIDDEN if train.hidden else "no labels, which losses.task needs; give --target-column"
            raise ValueError(
                f"data {data_name(data)!r}: {why}, or learn from the teacher alone with --method prediction"
            )
        return train, dev

    def read_split(self, data: Any, split: str) -> Labelled:
        recipe = self.recipe
        rows = load_rows(data, split=split)
        if not rows:
            raise ValueError(f"data {str(data)[:200]!r}: no rows; expected at least one")
        columns = guess_label_columns(rows, recipe.source_column, recipe.pair_column, recipe.target_column)
        kind: Any = recipe.task
        found = read_labelled(rows, columns, self.names, kind)
        found = dataclasses.replace(found, texts=[recipe.source_prefix + text for text in found.texts])
        if split == "train" and self.names is None:
            self.names = found.names
        print(f"{data_name(data)} ({split}): {found}; {columns}", file=sys.stderr, flush=True)
        return found

    def adapt(self, model: Any, *, new_head: bool) -> Any:
        if has_head(model.config):
            self._check(model.config)
            return self._with_our_names(model)
        if not new_head:
            raise ValueError(
                f"{model.config.architectures[0]}: has no head for {self.recipe.task}; train one first, with --method "
                f"finetune --bits 32-32-32 --task {self.recipe.task}"
            )
        if self.recipe.task == "classification" and not self.names:
            raise ValueError("no classes are known: neither the checkpoint nor any training data has them; give --data")
        return with_head(model, self.recipe, self.names)

    def _check(self, config: Any) -> None:
        kind = (config.architectures or [config.model_type])[0]
        if config.problem_type == "multi_label_classification":
            raise ValueError(
                f"{kind}: problem_type 'multi_label_classification'; expected one label a text, or a number"
            )
        if (config.num_labels == 1) != (self.recipe.task == "regression"):
            fit = "regression" if config.num_labels == 1 else "classification"
            raise ValueError(
                f"task {self.recipe.task!r}: {kind} has {config.num_labels} outputs; expected task {fit!r}"
            )

    def _with_our_names(self, model: Any) -> Any:
        """Classes named and ordered as the task has them, in place: a student may come with an order of its own."""
        config, names = model.config, self.names
        own = class_names(config)
        if self.recipe.task == "regression" or names is None or own == names:
            return model
        if len(own) != len(names) or not (sorted(own) == sorted(names) or unnamed(own) or unnamed(names)):
            raise ValueError(
                f"{type(model).__name__} has classes {', '.join(own)[:80]}; expected {', '.join(names)[:80]}: give a "
                "checkpoint without a head, or one of the same classes"
            )
        if sorted(own) == sorted(names):
            head = [module for module in model.classifier.modules() if hasattr(module, "out_features")][-1]
            order = [own.index(name) for name in names]
            head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
        if not unnamed(names):
            config.id2label = dict(enumerate(names))
            config.label2id = {name: i for i, name in enumerate(names)}
        return model

    def training_set(self, train: Labelled, teacher: Any, folder: Path) -> tuple[Any, Any]:
        return encode_labelled(self.tokenizer, train, self.recipe.max_source_length), self.collator

    def is_scored(self, examples: Labelled) -> bool:
        return examples.labels is not None

    def score(self, model: Any, examples: Labelled, *, settings: Any = None) -> Outcome:
        encoded = encode_labelled(self.tokenizer, examples, self.recipe.max_source_length, progress=False)
        logits_NC = predict_logits(model, encoded, self.collator, self.recipe.eval_batch_size)
        found = score_labels(self.recipe.scored_by, logits_NC, examples.labels, examples.names)
        if self.recipe.task == "regression":
            return Outcome(found, [f"{value:.3f}" for value in logits_NC[:, 0]])
        names = self.names or [str(i) for i in range(logits_NC.shape[1])]
        return Outcome(found, [names[i] for i in logits_NC.argmax(1)])

    def shown(self, examples: Labelled) -> list[dict[str, str]]:
        pairs = examples.pairs or [""] * len(examples)
        texts = [f"{a} | {b}" if b else a for a, b in zip(examples.texts, pairs, strict=True)]
        labels = examples.labels or [""] * len(examples)
        names = examples.names
        wanted = [names[int(i)] if names and i != "" else str(i) for i in labels]
        return [{"source": text, "reference": label} for text, label in zip(texts, wanted, strict=True)]

    def probe(self, model: Any, examples: Labelled | None) -> dict[str, Any]:
        if examples is None:
            return super().probe(model, examples)
        some = encode_labelled(
            self.tokenizer, examples.select(range(min(PROBES, len(examples)))), self.recipe.max_source_length
        )
        return {name: x for name, x in self.collator(list(some)).items() if name != "labels"}


def has_head(config: Any) -> bool:
    """Whether the checkpoint came with a classification head."""
    return bool((config.architectures or ["ForSequenceClassification"])[0].endswith("ForSequenceClassification"))


def class_names(config: Any) -> list[str]:
    """In id order; config.json may have numbers for names."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def with_head(model: Any, recipe: Recipe, names: list[str] | None) -> Any:
    """The same base model under a new head, from the recipe's seed."""
    from transformers import set_seed

    config = copy.deepcopy(model.config)
    if recipe.task == "regression":
        config.num_labels, config.problem_type = 1, "regression"
    else:
        config.id2label = dict(enumerate(names or []))
        config.label2id = {name: i for i, name in config.id2label.items()}
        config.problem_type = "single_label_classification"
    config.architectures = [type(model).__name__]
    set_seed(recipe.seed)
    new: Any = shared_model(type(model), config)  # of an ALBERT, what it shares
    new.base_model.load_state_dict(model.base_model.state_dict())
    return new.to(model.device).eval()
