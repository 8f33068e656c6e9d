"""Logits of a whole data set, in its order.

Examples run longest first, so that a batch has little padding and memory fails at once. Trainer's `predict` was
rejected: it keeps the order of the set, pads every batch to the longest of all, and needs a Trainer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dqbart.data.batches import progress_bar


def predict_logits(
    model: Any,
    encoded: Any,
    collator: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    batch_size: int = 32,
    *,
    progress: bool = True,
) -> np.ndarray:
    """fp32 logits `[N, C]` of a sequence classification model, plain or packed, on the device where it is.

    `encoded`: items with `input_ids`, as `encode_labelled` gives; labels are left out, so no loss is computed. The
    model is in eval mode meanwhile and as it was afterwards, also after an error. Raises `ValueError` for no examples,
    a batch size below 1, and a model that gives anything but a row of logits for each example.
    """
    if not len(encoded):
        raise ValueError("nothing to predict: no examples; expected at least one")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size {batch_size!r}: expected a whole number of at least 1")
    order = np.argsort([-len(item["input_ids"]) for item in encoded], kind="stable")
    rows: list[np.ndarray] = []
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), progress_bar(len(order), "predicting", unit="text", enabled=progress) as bar:
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size].tolist()
                batch = collator([encoded[i] for i in indices])
                inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
                logits = getattr(model(**inputs), "logits", None)
                if logits is None or logits.dim() != 2 or len(logits) != len(indices):
                    shape = "none" if logits is None else list(logits.shape)
                    raise ValueError(
                        f"{type(model).__name__} gives logits {shape} for {len(indices)} texts; expected [texts, "
                        "classes]; load it with AutoModelForSequenceClassification"
                    )
                rows.append(logits.float().cpu().numpy())
                bar.update(len(indices))
    finally:
        for module in training:  # one by one: some parts may be frozen in eval mode on purpose
            module.training = True
    logits_NC = np.concatenate(rows)
    restored_NC = np.empty_like(logits_NC)
    restored_NC[order] = logits_NC
    return restored_NC
