"""Extractive question answering: SQuAD v1 and v2, and whatever looks like them."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from dqbart.data.question_windows import EncodedQuestions, QuestionCollator, encode_questions
from dqbart.data.questions import Questions, read_questions
from dqbart.data.splits import data_name
from dqbart.evaluation.predict import predict_spans
from dqbart.evaluation.question_metrics import best_answers, best_null_threshold, question_score
from dqbart.recipe import Recipe
from dqbart.tasks import PROBES, Outcome, Task

LONGEST, STRIDE = 384, 128  # tokens; BERT's for SQuAD
SHORT_ANSWERS = 30  # tokens
THRESHOLD = "null_threshold"  # by how much "no answer" must score above the best span, in `generation`


class QuestionAnswering(Task):
    """Answers are parts of the context, or nothing where the data have questions without one.

    There scores also have best_f1 (or best_exact), as SQuAD's own script prints it: with the threshold that these very
    examples would choose, which the score's `generation` names. It flatters; found on dev, it is for test.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        super().__init__(recipe, tokenizer)
        self.collator = QuestionCollator(tokenizer.pad_token_id)
        for name, value in recipe.generation.items():
            if name != THRESHOLD or type(value) not in (int, float):
                raise ValueError(
                    f"generation {name!r}: {value!r}: questions have {THRESHOLD!r} alone, a number such as 0"
                )

    def read_split(self, data: Any, split: str) -> Questions:
        found = read_questions(data, split)
        print(f"{data_name(data)} ({split}): {found}", file=sys.stderr, flush=True)
        return found

    def adapt(self, model: Any, *, new_head: bool) -> Any:
        architecture = (model.config.architectures or ["ForQuestionAnswering"])[0]
        if not new_head and not architecture.endswith("ForQuestionAnswering"):
            raise ValueError(
                f"{architecture}: has no head for questions; train one first, with --method finetune "
                "--bits 32-32-32 --task questions"
            )
        return model

    def training_set(self, train: Questions, teacher: Any, folder: Path) -> tuple[Any, Any]:
        return self._encode(train), self.collator

    def is_scored(self, examples: Questions) -> bool:
        return True

    def score(self, model: Any, examples: Questions, *, settings: Any = None) -> Outcome:
        encoded = self._encode(examples, progress=False)
        logits = predict_spans(model, encoded, self.collator, self.recipe.eval_batch_size)
        always = all(question.answers for question in examples)
        threshold = math.inf if always else self.recipe.generation.get(THRESHOLD, 0.0)
        found = best_answers(examples, encoded, *logits, max_answer_length=SHORT_ANSWERS, null_threshold=threshold)
        texts = [answer.text for answer in found]
        language, main = self.recipe.written_in, self.recipe.scored_by
        score = question_score(examples, texts, language=language)
        values = {main: score.values[main]} | score.values
        if always:
            return Outcome(dataclasses.replace(score, values=values), texts)
        best, value = best_null_threshold(examples, found, figure=main, language=language)
        values[f"best_{main}"] = value
        settings = {THRESHOLD: threshold, f"best_{main}_{THRESHOLD}": best}
        return Outcome(dataclasses.replace(score, values=values, generation=settings), texts)

    def shown(self, examples: Questions) -> list[dict[str, str]]:
        return [
            {"source": f"{q.question} | {q.context}", "reference": q.answers[0] if q.answers else ""} for q in examples
        ]

    def probe(self, model: Any, examples: Questions | None) -> dict[str, Any]:
        if examples is None:
            return super().probe(model, examples)
        encoded = self._encode(examples.select(range(min(PROBES, len(examples)))))
        batch = self.collator([encoded[i] for i in range(min(PROBES, len(encoded)))])
        return {name: tensor for name, tensor in batch.items() if not name.endswith("_positions")}

    def _encode(self, questions: Questions, progress: bool = True) -> EncodedQuestions:
        length = min(LONGEST, self.recipe.max_source_length)
        half = (length - 4) // 3
        return encode_questions(
            self.tokenizer, questions, max_length=length, stride=min(STRIDE, half),
            max_question_length=min(64, half), progress=progress,
        )  # fmt: skip
