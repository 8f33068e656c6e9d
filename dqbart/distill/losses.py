"""Distillation losses as pure functions: tensors in, one scalar out, in fp32.

Two kinds. The masked ones are ours: each is a mean over real (not padding) positions, so neither padding nor batch
size changes it. The `paper_` ones are DQ-BART's released arithmetic (methods.md, section 1): means over everything,
padding included. Shapes: B batch, L positions, Q queries, K keys, H heads, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def task_loss(logits_BLV: Tensor, labels_BL: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, mean over labels that are not -100."""
    return F.cross_entropy(
        logits_BLV.float().flatten(0, 1), labels_BL.flatten(), ignore_index=-100, label_smoothing=label_smoothing
    )


def logits_kl(student_BLV: Tensor, teacher_BLV: Tensor, mask_BL: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of softmax(z / T), mean over masked-in positions (Hinton 2015)."""
    student_NV = student_BLV[mask_BL].float() / temperature
    teacher_NV = teacher_BLV[mask_BL].float() / temperature
    kl = F.kl_div(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), reduction="sum", log_target=True)
    return kl * temperature**2 / _count(mask_BL)


def logits_mse(student_BLV: Tensor, teacher_BLV: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared difference of raw logits over masked-in positions and the vocabulary."""
    return F.mse_loss(student_BLV[mask_BL].float(), teacher_BLV[mask_BL].float(), reduction="sum") / (
        _count(mask_BL) * student_BLV.size(-1)
    )


def hidden_mse(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean squared difference of hidden states over masked-in positions and the width."""
    error_BL = (student_BLD.float() - teacher_BLD.float()).square().mean(-1)
    return (error_BL * mask_BL).sum() / _count(mask_BL)


def attention_mse(student_BHQK: Tensor, teacher_BHQK: Tensor, query_mask_BQ: Tensor, key_mask_BK: Tensor) -> Tensor:
    """Squared difference of attention probabilities, mean over heads and real (query, key) pairs."""
    error_BQK = (student_BHQK.float() - teacher_BHQK.float()).square().mean(1)
    pairs_BQK = query_mask_BQ.unsqueeze(2) & key_mask_BK.unsqueeze(1)
    return (error_BQK * pairs_BQK).sum() / _count(pairs_BQK)


def paper_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """DQ-BART: mean over the whole tensor, padding and all."""
    return F.mse_loss(student.float(), teacher.float())


def paper_last_hidden(student_BLD: Tensor, teacher_BLD: Tensor) -> Tensor:
    """DQ-BART's `enc_hid_last`: their `zip` runs over examples, so this is batch size times the mean."""
    return paper_mse(student_BLD, teacher_BLD) * student_BLD.size(0)


def _count(mask: Tensor) -> Tensor:
    return mask.sum().clamp_min(1).to(torch.float32)
