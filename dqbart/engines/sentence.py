"""Sentence embeddings from any encoder: transformers' own, a student in training, or a packed folder in any engine.

Texts go in, one vector each comes out. Batches are made of texts of like length, longest first, so that little is
computed for padding and a batch too large for memory fails at the start. Names are those of the sentence-transformers
library's `SentenceTransformer`, so that what calls its `encode` and `similarity` can be given this object instead.
Rejected: a subclass of it, for a dependency of its size.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqbart.architectures import first_position
from dqbart.data.batches import Collator, encode_pairs, progress_bar
from dqbart.packed.json_file import read_json
from dqbart.packed.sentence import MODULES, Pooling, pool, read_pooling


class SentenceEncoder:
    """`model`: an encoder of transformers, with or without a head. `tokenizer`: its own. `pooling`: what makes vectors.

    Raises `ValueError` for a model that is no encoder, and for a tokenizer without words or without a padding token.
    """

    def __init__(self, model: Any, tokenizer: Any, pooling: Pooling) -> None:
        config = self.config = model.config
        positions = getattr(config, "max_position_embeddings", None)
        if config.is_encoder_decoder or positions is None:
            raise ValueError(f"model type {config.model_type!r}: expected an encoder with positions, such as BERT")
        if tokenizer.pad_token_id is None or set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            lacks = "padding token" if tokenizer.pad_token_id is None else "words, its files are not there"
            raise ValueError(f"tokenizer {tokenizer.name_or_path!r} has no {lacks}; give the one of the checkpoint")
        self.model, self.tokenizer, self.pooling = model, tokenizer, pooling
        self.dimension: int = config.hidden_size
        self._room = min(positions - first_position(config), tokenizer.model_max_length)
        self._length = min(pooling.max_seq_length or self._room, self._room)

    @classmethod
    def open(
        cls, folder: str | Path, engine: str = "auto", device: Any = None, threads: int | None = None
    ) -> "SentenceEncoder":
        """Of a sentence-transformers folder, packed (as `dqbart.load`) or in float, which runs in engine "torch".

        Raises `FileNotFoundError` or `ValueError`, one line, for a folder, a device or an engine that doesn't fit.
        """
        from dqbart.engines import load
        from dqbart.teacher import choose_device

        folder = Path(folder)
        pooling = read_pooling(folder)
        if pooling is None:
            what = f"no {MODULES} in it" if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder}: {what}; expected a sentence-transformers folder")
        if _is_packed(folder):
            return load(folder, engine=engine, device=device, threads=threads)
        if engine not in ("auto", "torch"):
            raise ValueError(f"engine {engine!r}: {folder} is not packed; leave engine out, or pack it first")
        from transformers import AutoModel

        where = choose_device("cpu" if device is None else str(device))
        try:
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: {' '.join(str(error).split())}") from None
        return cls(model.to(where).eval(), read_tokenizer(folder), pooling)

    @property
    def device(self) -> torch.device:
        return getattr(self.model.base_model, "runner", self.model).device

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text that are read, special ones included. Can be set, up to what the model has positions for."""
        return self._length

    @max_seq_length.setter
    def max_seq_length(self, length: int) -> None:
        if type(length) is not int or not 1 <= length <= self._room:
            raise ValueError(f"max_seq_length {length!r}: expected a whole number from 1 to {self._room}")
        self._length = length

    def get_sentence_embedding_dimension(self) -> int:
        return self.dimension

    @torch.no_grad()
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
    ) -> Any:
        """fp32 vectors [N, D] of N texts, in their order, or [D] of a single text.

        A numpy array, or a tensor on the model's device where `convert_to_tensor`, or not `convert_to_numpy`. Texts
        are cut at `max_seq_length`; one without any token gives zeros. `prompt`, or the one that the folder has under
        `prompt_name`, is put before each. `normalize_embeddings`: to length 1 even if the folder does not say so. The
        bar is shown on a terminal unless told. Puts the model into eval mode.
        Raises `ValueError` for anything but texts, for half a surrogate pair in one, and for an unknown prompt.
        """
        alone = isinstance(texts, str)
        given = _checked([texts] if isinstance(texts, str) else texts)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size {batch_size!r}: expected a whole number of at least 1")
        prefix, bar_on = self._prompt(prompt_name, prompt), show_progress_bar
        bar_on = sys.stderr.isatty() if bar_on is None else bar_on
        self.model.eval()
        base, device = self.model.base_model, self.device
        vector_ND = torch.zeros(len(given), self.dimension, device=device)
        if given:
            prepared = [(prefix + t).lower() if self.pooling.lowercase else prefix + t for t in given]
            encoded = encode_pairs(self.tokenizer, prepared, max_source_length=self._length, progress=bar_on)
            lengths_N = encoded.sources.lengths_R
            order = [int(i) for i in np.argsort(-lengths_N, kind="stable") if lengths_N[i]]
            collate = Collator(self.tokenizer.pad_token_id)
            with progress_bar(len(given), "texts to vectors", unit="text", enabled=bar_on) as bar:
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    batch = {name: t.to(device) for name, t in collate([encoded[i] for i in chosen]).items()}
                    hidden_BLD = base(**batch).last_hidden_state
                    vector_ND[chosen] = pool(hidden_BLD, batch["attention_mask"], self.pooling).float()
                    bar.update(len(chosen))
        if normalize_embeddings:
            vector_ND = torch.nn.functional.normalize(vector_ND, dim=-1)
        found = vector_ND[0] if alone else vector_ND
        return found if convert_to_tensor or not convert_to_numpy else found.cpu().numpy()

    def similarity(self, a: Any, b: Any) -> Tensor:
        """[N, M] of vectors [N, D] and [M, D], arrays or tensors: cosine, or what `pooling.similarity` names.

        Larger is more alike: distances are negative. A single vector counts as a list of one.
        """
        a_ND, b_MD = (torch.atleast_2d(torch.as_tensor(x, dtype=torch.float32)) for x in (a, b))
        if a_ND.dim() != 2 or a_ND.shape[1] != b_MD.shape[-1]:
            raise ValueError(f"vectors {list(a_ND.shape)} and {list(b_MD.shape)}: expected [N, D] and [M, D]")
        kind = self.pooling.similarity or "cosine"
        if kind in ("euclidean", "manhattan"):
            return -torch.cdist(a_ND, b_MD, p=2.0 if kind == "euclidean" else 1.0)
        if kind == "cosine":
            a_ND, b_MD = (torch.nn.functional.normalize(x, dim=-1) for x in (a_ND, b_MD))
        return a_ND @ b_MD.T

    def __repr__(self) -> str:
        return (
            f"SentenceEncoder({type(self.model).__name__}, {self.pooling.mode} of {self._length} tokens, "
            f"dimension {self.dimension})"
        )

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        name = self.pooling.default_prompt_name if name is None else name
        if prompt is not None:
            return prompt
        if name is not None and name not in self.pooling.prompts:
            known = ", ".join(map(repr, self.pooling.prompts)) or "none"
            raise ValueError(f"prompt_name {name!r}: expected one of the folder's prompts: {known}")
        return "" if name is None else self.pooling.prompts[name]


def read_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises `ValueError`, one line, where none can be made."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises a bare Exception for a broken file
        raise ValueError(f"{folder}: no tokenizer can be read there ({' '.join(str(error).split())[:200]})") from None


def _is_packed(folder: Path) -> bool:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in it; expected a checkpoint")
    return read_json(file, dict).get("quantization_config") is not None


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"texts are {type(texts).__name__}: expected a text or a list of texts")
    given = list(texts)
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise ValueError(f"text {i} is {type(text).__name__}: expected text")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON's \ud800 makes one; tokenizers can't take it
                raise ValueError(f"text {i} has half a surrogate pair at character {error.start}; replace it") from None
    return given
