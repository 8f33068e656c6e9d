"""Write texts with an encoder: source, what is written so far, and a [MASK] whose logits are the next token's.

transformers' generate does the writing (greedy, beams, sampling, every option), on an adapter that has the face of an
encoder-decoder: the "encoder" is the source's pass, the "decoder" is one step. So minimum and maximum length, length
penalty and repeated n-grams count what was written, as with BART. With the face of a decoder the source would be a
prompt, and its n-grams would be forbidden to a summary. Rejected, too: a beam search of our own.

A step costs two tokens, the newest and [MASK], where the model class takes a key-value cache (BERT, RoBERTa, XLM-R):
source keys and values never depend on the target, so each source is encoded once, whatever the number of beams. The
[MASK]'s own are dropped after each step. DistilBERT and ALBERT have no cache in transformers: each step is a whole pass
over source and target, and costs (source + target) tokens instead of 2.
"""

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.utils import ModelOutput

from dqbart.data.decoding import effective_generation
from dqbart.data.s2s import S2sLayout, additive_mask, s2s_mask
from dqbart.evaluation.generate import generate_texts

log = logging.getLogger("dqbart")


@dataclass
class EncodedSource(ModelOutput):
    """Ids and mask `[B, S]`; what its tokens show to others, `[B, layers, H, S, D]`, where the class takes a cache."""

    input_ids: Any = None
    mask: Any = None
    all_keys: Any = None
    all_values: Any = None


class SourceEncoder(nn.Module):
    """The source's pass, as generate calls an encoder. Holds no weights of its own."""

    main_input_name = "input_ids"

    def __init__(self, model: Any, layout: S2sLayout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.caches = "past_key_values" in inspect.signature(model.base_model.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> EncodedSource:  # fmt: skip
        """`token_type_ids` are what tokenizers give along, 0 for sources, and not looked at."""
        mask_BS = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.caches:
            return EncodedSource(input_ids, mask_BS)
        cache = DynamicCache()
        self.model.base_model(
            input_ids=input_ids, past_key_values=cache,
            attention_mask=additive_mask(s2s_mask(torch.zeros_like(input_ids), mask_BS), self.model.dtype),
            position_ids=_source_positions(mask_BS) + self.layout.first_position,
        )  # fmt: skip
        keys, values = (torch.stack([getattr(layer, side) for layer in cache.layers], 1) for side in ("keys", "values"))
        return EncodedSource(input_ids, mask_BS, keys, values)


class Seq2SeqEncoder(PreTrainedModel, GenerationMixin):
    """A masked-language model with `generate`: `input_ids` and `attention_mask` `[B, S]` in, target ids out.

    Output rows are a start token, which the model never sees, the target and its end token, then padding. Rows depend
    neither on batch mates nor on the side of padding. Weights are the model's own, shared. Raises `ValueError` as
    `S2sLayout.of`.
    """

    main_input_name = "input_ids"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        layout = S2sLayout.of(model, tokenizer)
        config = copy.deepcopy(model.config)
        config.is_encoder_decoder = True
        config._attn_implementation = "eager"  # the adapter has no attention of its own; the model keeps its choice
        super().__init__(config)
        self.layout, self.encoder = layout, SourceEncoder(model, layout)
        self.generation_config = GenerationConfig(
            decoder_start_token_id=self.layout.start, eos_token_id=self.layout.end, pad_token_id=self.layout.pad
        )

    @property
    def model(self) -> Any:
        return self.encoder.model

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, encoder_outputs: EncodedSource, past_key_values: Any = None,
        attention_mask: Tensor | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """All target ids at every step; the cache knows what it has seen. The source's mask is the encoder's."""
        return {
            "decoder_input_ids": input_ids, "encoder_outputs": encoder_outputs, "past_key_values": past_key_values
        }  # fmt: skip

    def forward(
        self, decoder_input_ids: Tensor, encoder_outputs: EncodedSource, past_key_values: Any = None, **kwargs: Any
    ) -> Seq2SeqLMOutput:
        """Logits `[B, 1, V]` of the token after `decoder_input_ids` `[B, 1 + T]`, a start token and the target so far.

        A cache (transformers' EncoderDecoderCache) is filled with source and target. Raises `ValueError` where the
        model has no position left.
        """
        source, layout = encoder_outputs, self.layout
        mask_B1 = torch.full_like(decoder_input_ids[:, :1], layout.mask)
        ids_BL = torch.cat([source.input_ids, decoder_input_ids[:, 1:], mask_B1], 1)
        if ids_BL.size(1) > layout.positions:
            raise ValueError(
                f"{ids_BL.size(1)} tokens of source and target: the model has {layout.positions} positions; lower "
                "max_source_length or max_new_tokens"
            )
        steps_T = torch.arange(decoder_input_ids.size(1), device=ids_BL.device)
        target_BT = source.mask.sum(1, keepdim=True) + steps_T
        positions_BL = torch.cat([_source_positions(source.mask), target_BT], 1)
        order_BL = torch.cat([torch.zeros_like(source.input_ids), target_BT], 1)
        real_BL = torch.cat([source.mask.bool(), torch.ones_like(target_BT, dtype=torch.bool)], 1)

        cache, seen = None, 0
        if past_key_values is not None and self.encoder.caches:
            cache = past_key_values.self_attention_cache
            if cache.get_seq_length() == 0:
                layers = zip(source.all_keys.unbind(1), source.all_values.unbind(1), strict=True)
                for i, (key, value) in enumerate(layers):
                    cache.update(key, value, i)
                source["all_keys"] = source["all_values"] = None  # the cache has its own copies
            seen = cache.get_seq_length()
        inputs: dict[str, Any] = {
            "input_ids": ids_BL[:, seen:], "position_ids": positions_BL[:, seen:] + layout.first_position,
            "attention_mask": additive_mask(s2s_mask(order_BL, real_BL)[:, seen:], self.dtype),
        }  # fmt: skip
        if layout.token_types:
            inputs["token_type_ids"] = (order_BL[:, seen:] > 0).long()
        if cache is not None:
            inputs["past_key_values"] = cache
        with _last_logits(self.model):
            logits_B1V = self.model(**inputs).logits
        if cache is not None:
            cache.crop(-1)  # [MASK]
        return Seq2SeqLMOutput(logits=logits_B1V)


def _source_positions(mask_BS: Tensor) -> Tensor:
    """0, 1, ... along real tokens, whatever side the padding is on."""
    return (mask_BS.long().cumsum(1) - 1).clamp(min=0)


@contextmanager
def _last_logits(model: Any) -> Iterator[None]:
    """Multiply the vocabulary by the last position only: `logits` come out as `[B, 1, V]`."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:],))
    try:
        yield
    finally:
        hook.remove()


def write_texts_s2s(
    model: Any,
    tokenizer: Any,
    sources: Sequence[str],
    *,
    batch_size: int = 32,
    max_source_length: int | None = None,
    max_target_length: int = 48,
    source_prefix: str = "",
    progress: bool = True,
    **generation: Any,
) -> list[str]:
    """One text per source, in order, written by a masked-language model trained on `S2sCollator`'s batches.

    `generation` are transformers' settings (`num_beams`, `length_penalty`, `min_new_tokens`, `no_repeat_ngram_size`).
    `max_target_length` bounds the output where they don't, its end token counted. Sources share the model's positions
    with the output and are cut to what is left, or to `max_source_length`; how many is said in the log. Raises
    `ValueError` as `S2sLayout.of`, `effective_generation` and `generate_texts`, and where no position is left.
    """
    writer = Seq2SeqEncoder(model, tokenizer)
    settings = effective_generation(writer, generation, tokenizer=tokenizer, max_target_length=max_target_length)
    longest = settings.get("max_new_tokens") or settings["max_length"] - 1
    room = writer.layout.positions - longest
    if room < 3:
        raise ValueError(
            f"{longest} new tokens: the model has {writer.layout.positions} positions for source and target together; "
            "give a smaller max_target_length or max_new_tokens"
        )
    limit = room if max_source_length is None else min(room, max_source_length)
    texts = generate_texts(
        writer, tokenizer, sources, batch_size=batch_size, max_source_length=limit, generation=settings,
        source_prefix=source_prefix, progress=progress,
    )  # fmt: skip
    cut = sum(len(ids) > limit for ids in tokenizer([source_prefix + source for source in sources])["input_ids"])
    if cut:
        log.warning(
            "%d of %d sources were cut to %d tokens, to leave %d for the target", cut, len(sources), limit, longest
        )
    return texts
