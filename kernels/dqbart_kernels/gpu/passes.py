"""A transformer's packed weights on a device, and its passes as launches: BART, mBART, or an encoder.

Tensors come by the names and through the calls that the CPU engine takes them (cpu/src/model.cpp). Rows of a batch are
padded to one length; attention sees each source's own tokens alone, and everything else is row by row, so what one
source gives depends neither on its batch nor on padding. Activations between products are fp32 and as the contract has
them: both native engines and the torch engine compute the same bits.

Shape suffixes: B sources, S source tokens, M = B S rows, R decoder rows (the beams of each source side by side).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dqbart_kernels.gpu.attention import Heads, attend, quantize_heads
from dqbart_kernels.gpu.history import Cache, attend_history
from dqbart_kernels.gpu.one_shot import fits, one_shot_matmul
from dqbart_kernels.gpu.products import Weight, int8_matmul
from dqbart_kernels.gpu.rows import embed, norm_and_quantize
from dqbart_kernels.gpu.rules import Rules
from dqbart_kernels.gpu.vocabulary import best_tokens
from dqbart_kernels.sizes import ACTIVATIONS, complete

Codes = tuple[Tensor, Tensor]  # int8 [M, K], fp32 [M]


class Rows:
    """Rows on their way into a product: LayerNorm, or nothing, and int8 codes, each made when it is asked for.

    Few rows are normed and quantized inside the product itself (one_shot.py); then nothing is made here.
    """

    def __init__(
        self,
        x_MD: Tensor,
        norm: tuple[Tensor, Tensor] | None = None,
        eps: float = 1e-5,
        codes: Codes | None = None,
        wanted: bool = True,
    ) -> None:
        """`codes`: where they are known. `wanted`: LayerNorm's result is read too, later."""
        self.x_MD, self._norm, self._eps, self._codes, self._wanted = (
            x_MD,
            norm,
            eps,
            codes,
            wanted and norm is not None,
        )
        self._value: Tensor | None = None

    @property
    def codes(self) -> Codes:
        if self._codes is None:
            weight_D, bias_D = self._norm or (None, None)
            codes, scale, value = norm_and_quantize(self.x_MD, weight_D, bias_D, self._eps, self._wanted)
            self._codes, self._value = (codes, scale), value
        return self._codes

    @property
    def value(self) -> Tensor:
        """What the codes stand for, fp32 [M, D]."""
        if self._norm is None:
            return self.x_MD
        if self._value is None:
            assert self._wanted and self._codes is None
            _ = self.codes
        assert self._value is not None
        return self._value

    def into(self, linear: "Linear", residual_MN: Tensor | None = None, activation: str = "none") -> Tensor:
        """The product of these rows."""
        if self._codes is not None or not fits(len(self.x_MD), linear.weight, self._norm is not None):
            return int8_matmul(*self.codes, linear.weight, linear.bias_N, residual_MN, activation)
        keep = self._wanted and self._value is None
        y_MN, value = one_shot_matmul(
            self.x_MD, linear.weight, linear.bias_N, self._norm, residual_MN, activation, self._eps, keep
        )
        self._value = value if keep else self._value
        return y_MN


@dataclass(frozen=True)
class Linear:
    """One product: projections of the same input lie one after the other."""

    weight: Weight
    bias_N: Tensor


@dataclass(frozen=True)
class Sources:
    """What the decoder reads of its sources: cross-attention's keys and values in every layer, and their lengths."""

    keys: list[Heads]
    values: list[Heads]
    length_B: Tensor  # int32


@dataclass(frozen=True)
class State:
    """Where a generation stands: the self-attention caches, what each row read at each step, and who wrote what."""

    caches: list[Cache]
    tokens_TR: Tensor  # int32; row 0: the start tokens
    history_RT: Tensor  # int32: see `attend_history`
    step: Tensor  # int32 [1]


class Passes:
    """Filled by `set_matrix` and `set_vector`, then used. `sizes`: see `dqbart_kernels.sizes`.

    Raises `ValueError` with the name for what doesn't fit.
    """

    def __init__(self, sizes: dict[str, int], embed_scale: float, eps: float, device: torch.device | str) -> None:
        self.sizes, self.embed_scale, self.device = complete(sizes), embed_scale, torch.device(device)
        self.eps = float(np.float32(eps))  # what kernels get of it; Triton's interpreter would take more
        self.activation = {number: name for name, number in ACTIVATIONS.items()}[self.sizes["activation"]]
        self.heads, self.width = self.sizes["heads"], self.sizes["d"] // self.sizes["heads"]
        self.scaling = float(np.float32(self.width**-0.5))
        self._parts: dict[str, tuple[Weight, Tensor]] = {}
        self._vectors: dict[str, Tensor] = {}
        self._linear: dict[str, Linear] = {}

    def set_matrix(self, name: str, bits: int, shape: tuple[int, int], planar: Any, scale: Any, bias: Any) -> None:
        """`planar`: planar32 bytes [N, row bytes]; `scale`, `bias`: [N]; all numpy arrays."""
        n, k = shape
        packed = torch.from_numpy(np.ascontiguousarray(planar)).view(n, -1).to(self.device)
        zeros = np.zeros(n, np.float32)
        weight = Weight(packed, torch.from_numpy(scale).to(self.device), bits, k)
        self._parts[name] = weight, torch.from_numpy(zeros if bias is None else bias).to(self.device)

    def set_vector(self, name: str, values: Any) -> None:
        self._vectors[name] = torch.from_numpy(np.array(values, np.float32)).to(self.device)

    def finish(self) -> None:
        """Join what is multiplied together. Raises `ValueError` for a missing matrix."""
        for stack, of_decoder in (("encoder", False), ("decoder", True)):
            for layer in range(self.sizes[f"{stack}_layers"]):
                name = f"{stack}.layers.{layer}."
                self._join(name + "self_attn.qkv", [name + f"self_attn.{x}_proj" for x in "qkv"])
                if of_decoder:
                    self._join(name + "encoder_attn.kv", [name + f"encoder_attn.{x}_proj" for x in "kv"])
        self._linear |= {name: Linear(*part) for name, part in self._parts.items() if name != "shared"}
        if "shared" not in self._parts:
            raise ValueError("shared: missing")
        self.vocabulary = self._parts["shared"][0]
        self._parts.clear()

    def _join(self, name: str, parts: list[str]) -> None:
        missing = [part for part in parts if part not in self._parts]
        if missing:
            raise ValueError(f"{missing[0]}: missing")
        weights, biases = zip(*(self._parts.pop(part) for part in parts), strict=True)
        packed, scale = torch.cat([w.packed_NW for w in weights]), torch.cat([w.scale_N for w in weights])
        self._linear[name] = Linear(Weight(packed, scale, weights[0].bits, weights[0].k), torch.cat(biases))

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self._vectors[name + ".weight"], self._vectors[name + ".bias"]

    def _embed(self, stack: str, ids: Tensor, step: Tensor | None, types: Tensor | None) -> Rows:
        width, first = self.sizes["embedding_d"], self.sizes["position_offset"]
        table = self._vectors.get(f"{stack}.token_types.weight")
        kinds = None if table is None else (table.view(-1, width), types)
        norm = self._norm(f"{stack}.layernorm_embedding") if self.sizes["embedding_norm"] else None
        positions = self._vectors[f"{stack}.embed_positions.weight"].view(-1, width)
        h, codes, scale = embed(ids, self.vocabulary, positions, first, step, norm, kinds, self.embed_scale, self.eps)
        x = Rows(h, codes=(codes, scale))
        return Rows(x.into(self._linear[f"{stack}.embedding_map"])) if self.sizes["embedding_map"] else x

    def _start(self, norm: str, x: Rows) -> Rows:
        """The input of a block: normed here (mBART), or where the last one ended (BART)."""
        return Rows(x.x_MD, self._norm(norm), self.eps, wanted=False) if self.sizes["pre_norm"] else x

    def _end(self, norm: str, h_MD: Tensor) -> Rows:
        """What a block leaves to the next one, from its sum with the residual."""
        return Rows(h_MD) if self.sizes["pre_norm"] else Rows(h_MD, self._norm(norm), self.eps)

    def _feed_forward(self, layer: str, x: Rows) -> Rows:
        norm = layer + "final_layer_norm"
        wide = self._start(norm, x).into(self._linear[layer + "fc1"], activation=self.activation)
        return self._end(norm, Rows(wide).into(self._linear[layer + "fc2"], x.value))

    def _last(self, stack: str, x: Rows) -> Rows:
        return Rows(x.x_MD, self._norm(f"{stack}.layer_norm"), self.eps) if self.sizes["pre_norm"] else x

    def encode(self, ids_BS: Tensor, length_B: Tensor, type_BS: Tensor | None = None) -> Rows:
        """Hidden states, B S rows, of int32 ids, of whose columns the first `length_B` are tokens."""
        b, s = ids_BS.shape
        d, w = self.sizes["d"], self.width
        x = self._embed("encoder", ids_BS, None, type_BS)
        for step in range(self.sizes["encoder_steps"]):
            layer = f"encoder.layers.{step * self.sizes['encoder_layers'] // self.sizes['encoder_steps']}."
            norm = layer + "self_attn_layer_norm"
            qkv = self._start(norm, x).into(self._linear[layer + "self_attn.qkv"]).view(b, s, 3 * d)
            keys = quantize_heads(qkv[..., d:], self.heads, w)
            values = quantize_heads(qkv[..., 2 * d :], self.heads, w, transposed=True)
            mixed = attend(qkv, keys, values, length_B, self.scaling).view(b * s, d)
            x = self._end(norm, Rows(mixed).into(self._linear[layer + "self_attn.out_proj"], x.value))
            x = self._feed_forward(layer, x)
        return self._last("encoder", x)

    def sources(self, x: Rows, length_B: Tensor, s: int) -> Sources:
        """Cross-attention's keys and values of what `encode` gave."""
        _ = x.codes  # once, for all layers
        d, b = self.sizes["d"], len(length_B)
        keys, values = [], []
        for layer in range(self.sizes["decoder_layers"]):
            kv = x.into(self._linear[f"decoder.layers.{layer}.encoder_attn.kv"]).view(b, s, 2 * d)
            keys.append(quantize_heads(kv, self.heads, self.width))
            values.append(quantize_heads(kv[..., d:], self.heads, self.width, transposed=True))
        return Sources(keys, values, length_B)

    def state(self, rows: int, steps: int) -> State:
        """Room for `steps` steps of `rows` hypotheses."""
        layers = range(self.sizes["decoder_layers"])
        return State(
            [Cache.of(steps, rows, self.heads, self.width, self.device) for _ in layers],
            torch.zeros((steps + 1, rows), dtype=torch.int32, device=self.device),
            torch.zeros((rows, steps), dtype=torch.int32, device=self.device),
            torch.zeros(1, dtype=torch.int32, device=self.device),
        )

    def decode(self, sources: Sources, state: State) -> Rows:
        """The decoder's last hidden states, R rows, of one step; rows of a source are neighbours. The caller moves
        `state` on."""
        d, b, rows = self.sizes["d"], len(sources.length_B), state.tokens_TR.shape[1]
        x = self._embed("decoder", state.tokens_TR, state.step, None)
        for i, cache in enumerate(state.caches):
            layer = f"decoder.layers.{i}."
            norm = layer + "self_attn_layer_norm"
            qkv = self._start(norm, x).into(self._linear[layer + "self_attn.qkv"])
            mixed = attend_history(qkv, cache, state.history_RT, state.step, self.scaling)
            x = self._end(norm, Rows(mixed).into(self._linear[layer + "self_attn.out_proj"], x.value))
            norm = layer + "encoder_attn_layer_norm"
            q = self._start(norm, x).into(self._linear[layer + "encoder_attn.q_proj"]).view(b, rows // b, d)
            mixed = attend(q, sources.keys[i], sources.values[i], sources.length_B, self.scaling).view(rows, d)
            x = self._end(norm, Rows(mixed).into(self._linear[layer + "encoder_attn.out_proj"], x.value))
            x = self._feed_forward(layer, x)
        return self._last("decoder", x)

    # The vocabulary has too many columns for every program to norm the rows again: both take codes.
    def logits(self, x: Rows) -> Tensor:
        """fp32 [R, V] of what `decode` gave."""
        return int8_matmul(*x.codes, self.vocabulary, self._vectors.get("final_logits_bias"))

    def best_tokens(
        self, x: Rows, k: int, normalize: bool, rules: Rules | None = None, step: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best logits fp32 [R, k], or their log-probabilities, and the tokens."""
        bias = self._vectors.get("final_logits_bias")
        return best_tokens(*x.codes, self.vocabulary, bias, k, normalize, rules, step)
