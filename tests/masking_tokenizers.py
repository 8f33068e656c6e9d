"""Tiny tokenizers of the real classes, for masked words in several scripts."""

from typing import Any

ENGLISH = "the cat dog house bird river old new sees likes big small tree night book city don can a it hello world"
HAN = "我喜欢北京你好天地人大中国"
MARKS = [".", ",", "!", "'", "-", "。", "，"]


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    pieces = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *ENGLISH.split(), "un", "re"]
    pieces += ["##s", "##ing", "##t", "##house", "##able", "##中", *HAN, *MARKS, "s", "t", "1", "9"]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def roberta_tokenizer() -> Any:
    """Merges for " word" of six words, and for "the" at the beginning of a text; the rest stays in bytes."""
    from transformers import RobertaTokenizer

    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
        *"abcdefghijklmnopqrstuvwxyz",
        "Ġ",
        *".,!'()1",
        *"äåæçïĪľĳĤŃ½¥",
    ]
    merges: list[str] = []
    for word in ("Ġcat", "Ġdog", "Ġhouse", "Ġold", "Ġsees", "Ġbird", "the"):
        left = word[0]
        for letter in word[1:]:
            merge, left = f"{left} {letter}", left + letter
            if merge not in merges:
                merges.append(merge)
                pieces.append(left)
    return RobertaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[tuple(m.split()) for m in merges]
    )


def xlm_tokenizer() -> Any:
    from transformers import XLMRobertaTokenizer

    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *(f"▁{word}" for word in ENGLISH.split()),
        "s",
        "▁",
        "house",
        "▁un",
        *MARKS,
    ]
    pieces += ["▁我", *HAN, "喜欢", "北京", "中国", "▁北京", "人。"]
    scores = [0.0] * 4 + [-2.0 - len(MARKS) / (1 + len(piece)) for piece in pieces[4:]]
    return XLMRobertaTokenizer(vocab=[*zip(pieces, scores, strict=True), ("<mask>", 0.0)])


TOKENIZERS = {
    "bert": bert_tokenizer, "distilbert": bert_tokenizer, "albert": xlm_tokenizer,
    "roberta": roberta_tokenizer, "xlm-roberta": xlm_tokenizer,
}  # fmt: skip
