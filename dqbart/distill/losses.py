"""Distillation losses as pure functions: tensors in, one scalar out, in fp32.

Two kinds. The masked ones are ours: each is a mean over a batch's real (not padding) positions, so that padding changes
nothing; accumulated batches count alike, whatever their tokens. The `paper_` ones are released arithmetic, DQ-BART's
unless said: means over everything, padding included. Shapes: B batch, L positions, Q queries, K keys, H heads, D width,
V vocabulary.
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
    """Squared difference of attention probabilities, or of scores before the softmax (TinyBERT), mean over heads and
    real (query, key) pairs.
    """
    pairs_BQK = query_mask_BQ.unsqueeze(2) & key_mask_BK.unsqueeze(1)
    gap_BHQK = (student_BHQK.float() - teacher_BHQK.float()).masked_fill(~pairs_BQK.unsqueeze(1), 0)
    return gap_BHQK.square().mean(1).sum() / _count(pairs_BQK)


def hidden_cosine(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """1 - cosine of hidden states, mean over masked-in positions (DistilBERT's third term)."""
    gap_BL = 1 - F.cosine_similarity(student_BLD.float(), teacher_BLD.float(), dim=-1)
    return (gap_BL * mask_BL).sum() / _count(mask_BL)


def sentence_gap(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """1 - cosine of sentence vectors, mean over sentences; of another width, with directions of its own, mean squared
    difference of the cosines between sentences of the batch.
    """
    student_BD, teacher_BE = (F.normalize(x.float(), dim=-1) for x in (student_BD, teacher_BE))
    if student_BD.shape == teacher_BE.shape:
        return (1 - (student_BD * teacher_BE).sum(-1)).mean()
    return F.mse_loss(student_BD @ student_BD.mT, teacher_BE @ teacher_BE.mT)


def soft_cross_entropy(student_BC: Tensor, teacher_BC: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the teacher's class probabilities, softmax(z / T), mean over examples (TinyBERT, DynaBERT)."""
    targets_BC = (teacher_BC.float() / temperature).softmax(-1)
    return F.cross_entropy(student_BC.float() / temperature, targets_BC)


def attention_kl(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask_BL: Tensor) -> Tensor:
    """KL(teacher || student) of softmax(q k^T / sqrt D), mean over heads and real queries of an example, then over
    examples (MiniLM, arXiv 2002.10957). Each model: q and k `[B, H, L, D]`, the same H, each its own D.
    """
    if student[0].shape[1] != teacher[0].shape[1]:
        raise ValueError(
            f"student with {student[0].shape[1]} heads, teacher with {teacher[0].shape[1]}: attention distributions "
            "need as many; relations (MiniLM v2) don't"
        )
    return _masked_kl(_relation(*student, mask_BL), _relation(*teacher, mask_BL), mask_BL)


def relation_kl(student_BLD: Tensor, teacher_BLD: Tensor, mask_BL: Tensor, heads: int) -> Tensor:
    """KL(teacher || student) of softmax(X X^T / sqrt d), X being queries, keys or values: mean over relation heads and
    real positions of an example, then over examples. With the models' own heads and X their values it is MiniLM's
    value relation (arXiv 2002.10957), with any number of heads MiniLMv2's (arXiv 2012.15828).

    `heads`: into how many each width is cut, d = D / heads. Raises `ValueError` where that is no whole number.
    """
    split = []
    for name, x_BLD in (("student", student_BLD), ("teacher", teacher_BLD)):
        b, length, width = x_BLD.shape
        if width % heads:
            fit = [n for n in range(1, width + 1) if width % n == 0 and abs(n - heads) <= heads]
            raise ValueError(f"{heads} relation heads don't divide the {name}'s width {width}: expected such as {fit}")
        split.append(x_BLD.view(b, length, heads, width // heads).transpose(1, 2))
    student, teacher = split
    return _masked_kl(_relation(student, student, mask_BL), _relation(teacher, teacher, mask_BL), mask_BL)


def _relation(a_BHLD: Tensor, b_BHLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Logarithms of softmax(a b^T / sqrt D) over real positions; what is masked out is very low, not minus infinity."""
    scores_BHLL = a_BHLD.float() @ b_BHLD.float().mT * a_BHLD.shape[-1] ** -0.5
    return scores_BHLL.masked_fill(~mask_BL.bool()[:, None, None], -1e30).log_softmax(-1)


def _masked_kl(student_BHLL: Tensor, teacher_BHLL: Tensor, mask_BL: Tensor) -> Tensor:
    real_BL = mask_BL.bool()
    gap_BHLL = (teacher_BHLL.exp() * (teacher_BHLL - student_BHLL)).masked_fill(~real_BL[:, None, None], 0)
    sum_B = (gap_BHLL.sum(-1) * real_BL[:, None]).sum((1, 2))
    return (sum_B / (gap_BHLL.shape[1] * real_BL.sum(1).clamp_min(1))).mean()


def paper_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """DQ-BART: mean over the whole tensor, padding and all."""
    return F.mse_loss(student.float(), teacher.float())


def paper_last_hidden(student_BLD: Tensor, teacher_BLD: Tensor) -> Tensor:
    """DQ-BART's `enc_hid_last`: their `zip` runs over examples, so this is batch size times the mean."""
    return paper_mse(student_BLD, teacher_BLD) * student_BLD.size(0)


def _count(mask: Tensor) -> Tensor:
    return mask.sum().clamp_min(1).to(torch.float32)
