"""What a model says of every example of a data set, in the set's order: classes, spans, masked words.

Examples run longest first, so that a batch has little padding and memory fails at once. Trainer's `predict` was
rejected: it keeps the order of the set, pads every batch to the longest of all with a number that looks like a logit,
holds everything on the device until the end, and needs a Trainer.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqbart.data.batches import model_inputs, progress_bar

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]


def predict_logits(
    model: Any, encoded: Any, collator: Collate, batch_size: int = 32, *, progress: bool = True
) -> np.ndarray:
    """fp32 logits `[N, C]` of a sequence classification model, plain or packed, on the device where it is.

    `encoded`: items with `input_ids`, as `encode_labelled` gives. The model is in eval mode meanwhile and as it was
    afterwards, also after an error. Raises `ValueError` for no examples, a batch size below 1, and a model that gives
    anything but a row of logits for each example.
    """
    if not len(encoded):
        raise ValueError("nothing to predict: no examples; expected at least one")
    rows: list[Any] = [None] * len(encoded)
    for indices, _, output in _outputs(model, encoded, collator, batch_size, "predicting", progress):
        logits = getattr(output, "logits", None)
        if logits is None or logits.dim() != 2 or len(logits) != len(indices):
            shape = "none" if logits is None else list(logits.shape)
            raise ValueError(
                f"{type(model).__name__} gives logits {shape} for {len(indices)} texts; expected [texts, "
                "classes]; load it with AutoModelForSequenceClassification"
            )
        for index, row in zip(indices, logits.float().cpu().numpy(), strict=True):
            rows[index] = row
    return np.stack(rows)


def predict_masked(
    model: Any, encoded: Any, collator: Collate, batch_size: int = 32, *, progress: bool = True
) -> list[np.ndarray]:
    """Best token and label at every masked position `[2, M]` of each example, of a masked language model.

    `encoded`: items with `labels`, -100 where nothing is masked. Its head sees the masked positions alone: of 32 texts
    of 512 tokens, XLM-R's logits would be 16 GB. Modes and errors as with `predict_logits`.
    """
    if not len(encoded):
        raise ValueError("nothing to predict: no examples; expected at least one")
    found: list[Any] = [None] * len(encoded)
    asked: list[Tensor] = []  # bool [B, L] of the batch that is in the model

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collator(items)
        asked[:] = [batch["labels"] != -100]
        return batch

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][asked[0].to(inputs[0].device)],))
    try:
        for indices, batch, output in _outputs(model, encoded, collate, batch_size, "guessing masked words", progress):
            best_M = output.logits.argmax(-1).cpu().numpy()
            counts_B = asked[0].sum(1).tolist()
            pairs_2M = np.stack([best_M, batch["labels"][asked[0]].numpy()])
            for index, pairs in zip(indices, np.split(pairs_2M, np.cumsum(counts_B)[:-1], axis=1), strict=True):
                found[index] = pairs
    finally:
        hook.remove()
    return found


def predict_spans(
    model: Any, encoded: Any, collator: Collate, batch_size: int = 32, *, progress: bool = True
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`(start_logits, end_logits)`: one float32 array `[L]` per feature, without padding, in the order of `encoded`.

    `encoded`: `EncodedQuestions`. Modes as with `predict_logits`. Raises `ValueError` for a batch size below 1 and a
    model without start and end logits.
    """
    starts: list[np.ndarray] = [np.empty(0, np.float32)] * len(encoded)
    ends = list(starts)
    for indices, batch, output in _outputs(model, encoded, collator, batch_size, "answering", progress):
        if not hasattr(output, "start_logits") or not hasattr(output, "end_logits"):
            raise ValueError(
                f"{type(model).__name__} gives no start and end logits; load the checkpoint with "
                "AutoModelForQuestionAnswering"
            )
        lengths = batch["attention_mask"].sum(1).tolist()
        for rows, logits_BL in ((starts, output.start_logits), (ends, output.end_logits)):
            for index, values_L, length in zip(indices, logits_BL.float().cpu().numpy(), lengths, strict=True):
                rows[index] = values_L[:length].copy()
    return starts, ends


def _outputs(
    model: Any, encoded: Any, collator: Collate, batch_size: int, doing: str, progress: bool
) -> Iterator[tuple[list[int], dict[str, Tensor], Any]]:
    """Indices, batch and the model's output, batch by batch."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size {batch_size!r}: expected a whole number of at least 1")
    order = np.argsort([-len(item["input_ids"]) for item in encoded], kind="stable")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with progress_bar(len(order), doing, unit="text", enabled=progress) as bar:
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size].tolist()
                batch = collator([encoded[i] for i in indices])
                inputs = {name: tensor.to(model.device) for name, tensor in model_inputs(model, batch).items()}
                with torch.no_grad():  # around the model alone: it would hold in the caller's loop, too
                    output = model(**inputs)
                yield indices, batch, output
                bar.update(len(indices))
    finally:
        for module in training:  # one by one: some parts may be frozen in eval mode on purpose
            module.training = True
