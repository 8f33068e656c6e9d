"""A packed model that writes text through a native engine: `generate` as one call into it.

`TextModel` has the face of a transformers model: `generate`, `config`, `generation_config`. transformers itself
resolves the generation settings, on a model without weights, so defaults, checkpoint settings and their errors are its
own. What the native loop does not know (a custom processor, left padding, scores to return) runs in the torch engine,
loaded when it is needed, and is said. Rejected: a subclass of transformers' class with native forward passes: each of
its steps would cross into Python.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dqbart.data.decoding import IMPLEMENTATION_SETTINGS, SAMPLING_SETTINGS
from dqbart.engines.native import Runner, check_runs, open_native
from dqbart.packed.verify import build_skeleton, read_config, read_generation_config, read_spec

log = logging.getLogger("dqbart")

# transformers' settings that the native loop knows, and ours for them.
_SAME = (
    "num_beams", "num_return_sequences", "max_length", "min_length", "no_repeat_ngram_size", "early_stopping",
    "length_penalty", "repetition_penalty", "do_sample", "temperature", "top_k", "top_p",
)  # fmt: skip
_RENAMED = {
    "min_new_tokens": "min_new_tokens", "forced_bos_token_id": "forced_bos_token",
    "forced_eos_token_id": "forced_eos_token", "bad_words_ids": "bad_words", "suppress_tokens": "suppress",
    "begin_suppress_tokens": "begin_suppress",
}  # fmt: skip
# Known too, or of no effect here.
_OTHERS = IMPLEMENTATION_SETTINGS | frozenset(
    "max_new_tokens bos_token_id pad_token_id eos_token_id decoder_start_token_id".split()
)


class TextModel:
    """A packed BART or mBART that writes text natively. `generate` takes what transformers' does.

    `config` and `generation_config` are transformers' objects. `torch_model` is the same folder in the torch engine,
    loaded at first use: for logits, and for what the native loop doesn't do. Raises `FileNotFoundError` or
    `ValueError`, one line, for a folder that doesn't fit.
    """

    dtype = torch.float32
    training = False

    def __init__(self, folder: str | Path, runner: Runner) -> None:
        self.folder, self.runner = Path(folder), runner
        check_runs(runner, self.folder)
        config = read_config(self.folder)
        spec = read_spec(self.folder, config)
        self._skeleton = build_skeleton(self.folder, config, spec)
        self._skeleton.generation_config = (
            read_generation_config(self.folder, config) or self._skeleton.generation_config
        )
        self.config = self._skeleton.config
        open_native(self.folder, spec, self._skeleton, runner.make)
        self._torch_model: Any = None
        self._said: set[str] = set()

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def native(self) -> Any:
        """The engine's own model."""
        return self.runner.model

    @property
    def generation_config(self) -> Any:
        return self._skeleton.generation_config

    @property
    def torch_model(self) -> Any:
        """The same model in the torch engine."""
        if self._torch_model is None:
            from dqbart.packed.checkpoint import load_packed

            self._torch_model = load_packed(self.folder, device=self.device)
        return self._torch_model

    def eval(self) -> "TextModel":
        return self

    def modules(self) -> Any:
        """As of an `nn.Module` without parts: nothing here is ever in training mode."""
        return iter(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Logits, from the torch engine."""
        with torch.no_grad():
            return self.torch_model(*args, **kwargs)

    def __repr__(self) -> str:
        return f"TextModel({str(self.folder)!r}, engine {self.runner.name}: {self.runner.describe()})"

    @torch.no_grad()
    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Token ids [sequences, length], as transformers' `generate` for the same model and settings.

        `input_ids` and `attention_mask` [B, S], right-padded; settings as keyword arguments or a `GenerationConfig`.
        `streamer` and `seed` (of sampling; else drawn from torch's generator) are understood too.
        """
        call = dict(kwargs)
        ids = call.pop("input_ids", inputs)
        mask, streamer, seed = call.pop("attention_mask", None), call.pop("streamer", None), call.pop("seed", None)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
            found = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"input_ids {found}: expected token ids [batch, length], neither of them 0")
        settings, rest = self._skeleton._prepare_generation_config(generation_config, **call)
        self._skeleton._prepare_special_tokens(settings, True, device=ids.device)
        mask = self._mask(ids, mask, settings)
        reason = self._unsupported(settings, rest, mask, streamer)
        if reason is not None:
            if reason not in self._said:
                self._said.add(reason)
                log.warning("generate runs in the torch engine: engine %s does not know %s", self.runner.name, reason)
            return self._in_torch(inputs, generation_config, kwargs)
        return self._run(ids, mask, settings, call, streamer, seed)

    def _in_torch(self, inputs: Any, generation_config: Any, call: dict[str, Any]) -> Any:
        """transformers' own loop; tensors go to the device and what comes out goes where they came from."""
        given = {"inputs": inputs} | call
        moved = {name: x.to(self.device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        return self.torch_model.generate(generation_config=generation_config, **moved)

    def _mask(self, ids: Any, mask: Any, settings: Any) -> Any:
        if mask is not None:
            if tuple(mask.shape) != tuple(ids.shape):
                raise ValueError(
                    f"attention_mask {list(mask.shape)}: expected the shape of input_ids, {list(ids.shape)}"
                )
            return mask.bool()
        pad = settings._pad_token_tensor
        ends = settings._eos_token_tensor
        if pad is None or not (ids == pad).any() or (ends is not None and (ends == pad).any()):
            return torch.ones_like(ids, dtype=torch.bool)  # transformers guesses a mask by the same rule
        return ids != pad

    def _unsupported(self, settings: Any, rest: dict[str, Any], mask: Any, streamer: Any) -> str | None:
        """What the native loop can't do of this call, in words."""
        rest = {name: value for name, value in rest.items() if value is not None and name != "use_cache"}
        if rest:
            return f"the argument {sorted(rest)[0]!r}"
        lengths, place = mask.sum(1), torch.arange(mask.shape[1], device=mask.device)
        if (lengths == 0).any() or not torch.equal(mask, place < lengths[:, None]):
            return "padding on the left or inside a source"
        if settings.do_sample and settings.num_beams > 1:
            return "sampling with beams"
        if streamer is not None and (len(mask) > 1 or settings.num_beams > 1):
            return "a streamer for several texts or beams"
        if settings.decoder_start_token_id is None or isinstance(settings.decoder_start_token_id, list):
            return "a decoder start of its own per text"
        if isinstance(settings.forced_eos_token_id, list):
            return "several forced_eos_token_id"
        ends = settings._eos_token_tensor
        if settings.num_beams > (most := self.runner.most_beams(0 if ends is None else ends.numel())):
            return f"more than {most} beams"
        defaults = type(settings)._get_default_generation_params()
        known = {*_SAME, *_RENAMED} | _OTHERS | (set() if settings.do_sample else SAMPLING_SETTINGS)
        for name, value in settings.to_dict().items():
            if name not in known and not name.startswith("_") and value not in (None, defaults.get(name), False):
                return f"the setting {name!r}"
        return None

    def _run(self, ids: Any, mask: Any, settings: Any, call: dict[str, Any], streamer: Any, seed: int | None) -> Any:
        options = {name: value for name in _SAME if (value := getattr(settings, name, None)) is not None}
        options |= {
            ours: value for name, ours in _RENAMED.items() if (value := getattr(settings, name, None)) is not None
        }
        start = int(settings._decoder_start_token_tensor)
        ends = [] if settings._eos_token_tensor is None else settings._eos_token_tensor.reshape(-1).tolist()
        if call.get("max_new_tokens", settings.max_new_tokens) is not None:
            options["max_length"] = 1 + settings.max_new_tokens
        if "bad_words" in options:  # as transformers: an end token can't be a bad word by itself
            options["bad_words"] = [word for word in options["bad_words"] if len(word) > 1 or word[0] not in ends]
        if options.get("do_sample"):
            options["seed"] = int(torch.randint(2**62, ())) if seed is None else seed
        else:
            options = {name: value for name, value in options.items() if name not in SAMPLING_SETTINGS}
        sources = [row[keep].to(torch.int32).numpy() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
        on_token: Callable[[int, int], bool] | None = None
        if streamer is not None:
            streamer.put(torch.tensor([[start]]))

            def on_token(sequence: int, token: int) -> bool:
                streamer.put(torch.tensor([token]))
                return False

        rows, _, _ = self.runner.generate(sources, start_token=start, eos=ends, on_token=on_token, **options)
        if streamer is not None:
            streamer.end()
        pad = settings._pad_token_tensor
        fill = int(pad) if pad is not None else ends[0] if ends else -1
        out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        return out.to(ids.device)
