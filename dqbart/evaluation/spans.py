"""Start and end logits of every window of every question, from any extractive question answering model.

Trainer's `predict` was rejected: it pads all rows to one width with a number that looks like a logit, and holds them on
the device until the end.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqbart.data.batches import progress_bar
from dqbart.data.question_windows import EncodedQuestions


def predict_spans(
    model: Any,
    encoded: EncodedQuestions,
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
    batch_size: int = 32,
    *,
    progress: bool = True,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`(start_logits, end_logits)`: one float32 array `[L]` per feature, without padding, in the order of `encoded`.

    Longest windows first, so that memory fails early; the model is in eval mode meanwhile and as it was afterwards,
    also after an error. Raises `ValueError` for a batch size below 1 and a model without start and end logits.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size {batch_size!r}: expected a whole number of at least 1")
    lengths_F = encoded.input_ids.lengths_R
    order = np.argsort(-lengths_F, kind="stable").tolist()
    starts: list[np.ndarray] = [np.empty(0, np.float32)] * len(order)
    ends = list(starts)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), progress_bar(len(order), "answering", unit="window", enabled=progress) as bar:
            for begin in range(0, len(order), batch_size):
                indices = order[begin : begin + batch_size]
                batch = collator([encoded[i] for i in indices])
                inputs = {k: v.to(model.device) for k, v in batch.items() if not k.endswith("_positions")}
                output = model(**inputs)
                if not hasattr(output, "start_logits") or not hasattr(output, "end_logits"):
                    raise ValueError(
                        f"{type(model).__name__} gives no start and end logits; load the checkpoint with "
                        "AutoModelForQuestionAnswering"
                    )
                for rows, logits_BL in ((starts, output.start_logits), (ends, output.end_logits)):
                    values_BL = logits_BL.float().cpu().numpy()
                    for index, values_L in zip(indices, values_BL, strict=True):
                        rows[index] = values_L[: lengths_F[index]].copy()
                bar.update(len(indices))
    finally:
        for module in training:  # one by one: some parts may be frozen in eval mode on purpose
            module.training = True
    return starts, ends
