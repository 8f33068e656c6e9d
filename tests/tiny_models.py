"""Small randomly initialised models of every supported family, made by transformers itself."""

from typing import Any

import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    MBartConfig,
    MBartForConditionalGeneration,
    RobertaConfig,
    RobertaForMaskedLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

_SEQ2SEQ = dict(
    vocab_size=120, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
    decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    forced_eos_token_id=2, init_std=0.2, dropout=0.0,
)  # fmt: skip
_ENCODER = dict(
    vocab_size=120, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, initializer_range=0.2, pad_token_id=1,
)  # fmt: skip


def tiny_seq2seq(kind: str = "bart", encoder: int = 3, decoder: int = 2, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings = _SEQ2SEQ | dict(encoder_layers=encoder, decoder_layers=decoder) | changes
    if kind == "bart":
        return BartForConditionalGeneration(BartConfig(**settings, decoder_start_token_id=2)).eval()
    return MBartForConditionalGeneration(MBartConfig(**settings, scale_embedding=True)).eval()


def tiny_encoder(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "distilbert":
        config = DistilBertConfig(
            vocab_size=120,
            dim=32,
            n_layers=3,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=64,
            pad_token_id=1,
            initializer_range=0.2,
        )
        return DistilBertForMaskedLM(config).eval()
    if kind == "albert":
        return AlbertForMaskedLM(AlbertConfig(**_ENCODER, embedding_size=16)).eval()
    config, model = {
        "bert": (BertConfig, BertForMaskedLM),
        "roberta": (RobertaConfig, RobertaForMaskedLM),
        "xlm-roberta": (XLMRobertaConfig, XLMRobertaForMaskedLM),
    }[kind]
    return model(config(**_ENCODER)).eval()


ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "albert")
SEQ2SEQ = ("bart", "mbart")
FAMILIES = SEQ2SEQ + ENCODERS


def tiny(kind: str) -> Any:
    return tiny_seq2seq(kind) if kind in SEQ2SEQ else tiny_encoder(kind)


def token_batch(lengths: list[int], seed: int = 0, vocabulary: int = 120, pad: int = 1) -> dict[str, torch.Tensor]:
    """Random ids, right-padded, with their mask: input_ids and attention_mask `[B, L]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), pad)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, vocabulary, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 0, 2
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


def inputs_for(kind: str, lengths: tuple[int, ...] = (9, 5)) -> dict[str, torch.Tensor]:
    """`token_batch`, and decoder_input_ids where the model has a decoder."""
    batch = token_batch(list(lengths))
    if kind in SEQ2SEQ:
        batch["decoder_input_ids"] = token_batch([6] * len(lengths), seed=1)["input_ids"]
    return batch
