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
from dqbart.engines.native import Runner, check_ids, check_runs, load_in_torch, open_native, read_again
from dqbart.packed.shards import weights_digest
from dqbart.packed.verify import build_skeleton, read_config, read_generation_config, read_spec, unchanged

log = logging.getLogger("dqbart")

# transformers' settings that the native loop knows, and ours for them.
_SAME = (
    "num_beams", "num_return_sequences", "max_length", "min_length", "no_repeat_ngram_size", "early_stopping",
    "length_penalty", "repetition_penalty", "do_sample", "temperature", "top_k", "top_p",
)  # fmt: skip
_RENAMED = {
    "forced_bos_token_id": "forced_bos_token", "forced_eos_token_id": "forced_eos_token", "bad_words_ids": "bad_words",
    "suppress_tokens": "suppress", "begin_suppress_tokens": "begin_suppress",
}  # fmt: skip
_WHOLE = ("num_beams", "num_return_sequences", "max_length", "min_length", "no_repeat_ngram_size", "top_k")
# Known too, or of no effect here; groups of beams would have one.
_OTHERS = (IMPLEMENTATION_SETTINGS - {"num_beam_groups", "diversity_penalty"}) | frozenset(
    "max_new_tokens min_new_tokens bos_token_id pad_token_id eos_token_id decoder_start_token_id".split()
)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


class TextModel:
    """A packed BART or mBART that writes text natively. `generate` takes what transformers' does.

    `config` and `generation_config` are transformers' objects. `torch_model` is the same folder in the torch engine,
    loaded at first use: for logits, and for what the native loop doesn't do. Raises `FileNotFoundError` or
    `ValueError`, one line, for a folder that doesn't fit.
    """

    dtype = torch.float32
    training = False

    def __init__(self, folder: str | Path, runner: Runner) -> None:
        self.folder, self.runner = Path(folder).resolve(), runner
        check_runs(runner, self.folder)
        with unchanged(self.folder):
            self._weights = weights_digest(self.folder)
            config = read_config(self.folder)
            spec = read_spec(self.folder, config)
            self._skeleton = build_skeleton(self.folder, config, spec)
            self.config = self._skeleton.config
            own = read_generation_config(self.folder, self.config.vocab_size)
            self._skeleton.generation_config = own or self._skeleton.generation_config
            open_native(self.folder, spec, self._skeleton, runner.make)
        self._torch_model: Any = None
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_torch_model": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        read_again(self.folder, self._weights, self.runner)

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

    @generation_config.setter
    def generation_config(self, settings: Any) -> None:
        self._skeleton.generation_config = settings
        if self._torch_model is not None:
            self._torch_model.generation_config = settings

    @property
    def torch_model(self) -> Any:
        """The same model in the torch engine, with the same generation settings.

        Raises `FileNotFoundError` or `ValueError` where the folder is gone or holds other weights by now.
        """
        if self._torch_model is None:
            self._torch_model = load_in_torch(self.folder, self._weights, self.device)
            self._torch_model.generation_config = self.generation_config
        return self._torch_model

    def to(self, device: Any) -> "TextModel":
        """Itself; raises `ValueError` for another device or a dtype."""
        if isinstance(device, torch.dtype) or torch.device(device).type != self.device.type:
            raise ValueError(f"to({device}): engine {self.runner.name} stays as it is; load with device= or engine=")
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "runner" not in self.__dict__:  # copy and pickle look for some
            raise AttributeError(name)
        raise AttributeError(f"{name!r}: engine {self.runner.name} has none; load with engine='torch'")

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
        if ids is None and (other := {"inputs_embeds", "encoder_outputs"} & call.keys()):
            return self._in_torch(f"the argument {min(other)!r}", inputs, generation_config, kwargs)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
            found = list(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
            raise ValueError(f"input_ids {found}: expected token ids [batch, length], neither of them 0")
        check_ids(ids, self.config.vocab_size)
        said = [call, *(vars(given) for given in (generation_config, self.generation_config) if given is not None)]
        unsaid = [all(of.get(name) is None for of in said) for name in ("max_length", "min_length")]
        settings, rest = self._skeleton._prepare_generation_config(generation_config, **call)
        self._skeleton._prepare_special_tokens(settings, True, device=ids.device)
        self._skeleton._prepare_generated_length(settings, *unsaid, "input_ids", 1, ids)
        mask = self._mask(ids, mask, settings)
        reason = self._unsupported(settings, rest, mask, streamer)
        if reason is not None:
            return self._in_torch(reason, inputs, generation_config, kwargs)
        found = self._run(ids, mask, settings, streamer, seed)
        if found is None:
            reason = "what transformers writes where the tokens that may come run out"
            return self._in_torch(reason, inputs, generation_config, kwargs)
        return found

    def _in_torch(self, reason: str, inputs: Any, generation_config: Any, call: dict[str, Any]) -> Any:
        """transformers' own loop; tensors go to the device and ids come back to where they came from."""
        self._say(f"generate runs in the torch engine: engine {self.runner.name} does not know {reason}")
        given = {"inputs": inputs} | call
        seed = given.pop("seed", None)
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        given |= {name: x.to(self.device) for name, x in tensors.items()}
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            found = self.torch_model.generate(generation_config=generation_config, **given)
        back = next((x.device for x in tensors.values()), self.device)
        return found.to(back) if isinstance(found, torch.Tensor) else found

    def _say(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            log.warning(words)

    def _mask(self, ids: Any, mask: Any, settings: Any) -> Any:
        if mask is not None:
            if tuple(mask.shape) != tuple(ids.shape):
                raise ValueError(
                    f"attention_mask {list(mask.shape)}: expected the shape of input_ids, {list(ids.shape)}"
                )
            return mask.bool()
        if settings._pad_token_tensor is not None and (ids == settings._pad_token_tensor).any():
            self._say("input_ids have padding and there is no attention_mask: it is read as text, as by transformers")
        return torch.ones_like(ids, dtype=torch.bool)

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
        if streamer is not None and len(mask) * settings.num_beams * (settings.num_return_sequences or 1) > 1:
            return "a streamer for several texts or beams"
        if settings.decoder_start_token_id is None or isinstance(settings.decoder_start_token_id, list):
            return "a decoder start of its own per text"
        for name in ("forced_bos_token_id", "forced_eos_token_id", *_WHOLE):
            if type(value := getattr(settings, name, None)) not in (int, type(None)):
                return f"{name} {value!r}"
        for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
            value = getattr(settings, name, None)
            rows = value if name == "bad_words_ids" and isinstance(value, list) else [value]
            if value is not None and not (rows and all(map(_are_ids, rows))):
                return f"{name} {value!r}"
        bos, eos = settings.forced_bos_token_id, settings.forced_eos_token_id
        begins = settings.max_length == (2 if bos is None else 3)  # begin_suppress_tokens meet the last token
        suppressed = [*(settings.suppress_tokens or ()), *((begins and settings.begin_suppress_tokens) or ())]
        if bos in suppressed or eos in suppressed:
            return "a forced token that is suppressed"
        ends = settings._eos_token_tensor
        if settings.num_beams > (most := self.runner.most_beams(0 if ends is None else ends.numel())):
            return f"more than {most} beams"
        defaults = type(settings)._get_default_generation_params()
        known = {*_SAME, *_RENAMED} | _OTHERS | (set() if settings.do_sample else SAMPLING_SETTINGS)
        for name, value in settings.to_dict().items():
            unset = value is None or value is False or value == defaults.get(name)
            if name not in known and not name.startswith("_") and not unset:
                return f"the setting {name!r}"
        return None

    def _known(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if 0 <= token < self.config.vocab_size]

    def _run(self, ids: Any, mask: Any, settings: Any, streamer: Any, seed: int | None) -> Any:
        """The ids; None where beam search found fewer texts than are asked for.

        transformers fills these rows with whatever its topk makes of equal scores of -1e9.
        """
        options = {name: value for name in _SAME if (value := getattr(settings, name, None)) is not None}
        options |= {
            ours: value for name, ours in _RENAMED.items() if (value := getattr(settings, name, None)) is not None
        }
        start = int(settings._decoder_start_token_tensor)
        ends = [] if settings._eos_token_tensor is None else settings._eos_token_tensor.reshape(-1).tolist()
        ends = self._known(ends)  # -1 is a way to say: never
        options |= {name: self._known(options[name]) for name in ("suppress", "begin_suppress") if name in options}
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

        rows, scores, _ = self.runner.generate(sources, start_token=start, eos=ends, on_token=on_token, **options)
        if streamer is not None:
            streamer.end()
        if settings.num_beams > 1 and scores.min() <= -1e9:
            return None
        pad, end = settings._pad_token_tensor, settings._eos_token_tensor
        fill = -1 if pad is None else int(pad)
        if settings.num_beams > 1 and fill == 0 and end is not None:  # transformers takes a padding id of 0 for none
            fill = int(end.reshape(-1)[0])
        out = torch.full((len(rows), max(map(len, rows))), fill, dtype=torch.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        return out.to(ids.device)
