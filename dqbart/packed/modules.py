"""Modules that hold packed weights. They take the places of `nn.Linear` and `nn.Embedding` in transformers' classes.

A matrix is stored once, as planar32 words (int32) and fp32 scales. Both are buffers: as parameters they could be
tied by transformers' own name-based ties, but then `model.dtype` and `save_pretrained` would take the scales' dtype
for the model's. So the module that owns a vocabulary matrix keeps the buffers, and the modules tied to it (decoder
embedding, lm_head) hold an unregistered reference to the owner and no tensors but a bias.

Products run over an *operand* prepared at first use, outside the buffers: opaque to torch, dropped by `.to()`, copy
and pickle, and rebuilt from the words. On CPU it costs one byte per weight more (two for 8-bit codes on processors
whose int8 products saturate), so two bits shrink the file and the download, while memory in this engine is that of
int8. Embedding rows are decoded as they are looked up, since a table of all of them would cost as much again.
"""

from collections.abc import Callable
from typing import Any

import torch
from dqbart_kernels import gpu
from dqbart_kernels.integer_matmul import PreparedWeight, prepare_weight
from torch import Tensor, nn
from torch.nn import functional as F

from dqbart.packed.layout import FIELD_BITS, as_bytes, as_words, pack, pack_trits, unpack, unpack_trits
from dqbart.packed.spec import ModuleSpec
from dqbart.quant.layers import integer_linear
from dqbart.quant.quantizers import Quantizer


def _has_half_products(x: Tensor) -> bool:
    """Whether Triton multiplies packed weights where `x` is, in its type."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and gpu.reason(x.device) is None


class PackedMatrix(nn.Module):
    """A quantized matrix [N, K]: buffers `weight` (int32 [N, words]) and `weight_scale` (fp32 [N, 1] or [1, 1]).

    `quantizer` made the codes and says what they stand for (in paper numerics `weight_scale` divides symmetric codes);
    `input_quantizer` is how `product` quantizes its left operand (None: not at all).
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        spec: ModuleSpec,
        quantizer: Quantizer,
        input_quantizer: Quantizer | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.quantizer = quantizer
        self.input_quantizer = input_quantizer
        self.dtype = dtype  # of what comes out of a look-up
        self.expanded = spec.layout == "planar32"
        self.register_buffer("weight", torch.zeros(spec.weight_shape, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.ones(spec.scale_shape, dtype=torch.float32, device=device))
        self._operand: PreparedWeight | Tensor | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._operand = None  # was of the words before

    def expand(self) -> None:
        """Bring `weight` from the layout on disk to planar32. Called once, after loading."""
        if not self.expanded:
            self.weight = as_words(pack(unpack_trits(as_bytes(self.weight), self.spec.shape[1]), 2))
            self.expanded = True

    def stored_weight(self, layout: str) -> Tensor:
        """int32 words in `layout`."""
        if layout == ("planar32" if self.expanded else "trits"):
            return self.weight
        return as_words(pack_trits(self.codes()))

    def codes(self) -> Tensor:
        """int8 [N, K]."""
        return unpack(as_bytes(self.weight), self.spec.bits, self.spec.shape[1])

    def dequantize(self) -> Tensor:
        """fp32 [N, K]: what the codes stand for."""
        return self.quantizer.values(self.codes().float(), self.weight_scale)

    @torch.no_grad()
    def product(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        """`x [..., K]` times the matrix transposed, plus bias: [..., N] in the dtype of `x`."""
        quantizer = self.input_quantizer
        if quantizer is None and self.spec.granularity == "row" and _has_half_products(x):
            return self._weight_only(x, bias_N)
        if quantizer is None or quantizer.granularity == "tensor":  # weights only, or paper numerics: float product
            if self._operand is None:
                self._operand = self.dequantize()
            x = x if quantizer is None else quantizer.dequantize(x).to(x.dtype)
            return F.linear(x, self._operand.to(x.dtype), bias_N)  # type: ignore[union-attr]
        if self._operand is None:
            self._operand = prepare_weight(self.codes())
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN = integer_linear(x_MK, self._operand, self.weight_scale, bias_N, quantizer)  # type: ignore[arg-type]
        return y_MN.view(*x.shape[:-1], self.spec.shape[0])

    def _weight_only(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        """The product of half-precision `x`, on words that stay packed."""
        from dqbart_kernels.gpu.products import Weight
        from dqbart_kernels.gpu.weight_only import weight_only_matmul

        k, scale_N = x.shape[-1], self.weight_scale[:, 0].contiguous()
        packed = Weight(as_bytes(self.weight), scale_N, FIELD_BITS[self.spec.bits], k)
        bias_N = None if bias_N is None else bias_N.float()
        return weight_only_matmul(x.reshape(-1, k).contiguous(), packed, bias_N).view(*x.shape[:-1], packed.n)

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids [...]` as floats: [..., K] in the module's dtype."""
        words = F.embedding(ids.reshape(-1), self.weight)
        codes = unpack(as_bytes(words), self.spec.bits, self.spec.shape[1])
        scale = F.embedding(ids.reshape(-1), self.weight_scale)
        return self.quantizer.values(codes.float(), scale).to(self.dtype).view(*ids.shape, self.spec.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedMatrix":
        """`.to()` and its kin: scales stay fp32 whatever the model becomes, and the operand is stale."""
        scale = self.weight_scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = torch.empty_like(scale, device=self.weight_scale.device).copy_(scale)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self._operand = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_operand": None}

    def extra_repr(self) -> str:
        n, k = self.spec.shape
        return f"{n}x{k}, {self.spec.bits} bits, {self.spec.scheme}"


class PackedLinear(PackedMatrix):
    """`y = x W^T + bias` with W packed."""

    bias: nn.Parameter | None

    def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.out_features, self.in_features = self.spec.shape
        self.bias = _empty_bias(self) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.bias)


class PackedEmbedding(PackedMatrix):
    """A look-up of packed rows, times `embed_scale` as transformers' BartScaledWordEmbedding does."""

    def __init__(self, *args: Any, padding_idx: int | None, embed_scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_embeddings, self.embedding_dim = self.spec.shape
        self.padding_idx, self.embed_scale = padding_idx, embed_scale

    def forward(self, input: Tensor) -> Tensor:
        return self.rows(input) * self.embed_scale


class TiedEmbedding(nn.Module):
    """An embedding whose matrix another module owns."""

    def __init__(self, owner: PackedMatrix, *, padding_idx: int | None, embed_scale: float) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it is no submodule
        self.num_embeddings, self.embedding_dim = owner.spec.shape
        self.padding_idx, self.embed_scale = padding_idx, embed_scale

    @property
    def owner(self) -> PackedMatrix:
        return self._owner[0]

    def forward(self, input: Tensor) -> Tensor:
        return self.owner.rows(input) * self.embed_scale


class PackedHead(nn.Module):
    """An output layer whose matrix another module owns: lm_head over the vocabulary matrix."""

    bias: nn.Parameter | None

    def __init__(self, owner: PackedMatrix, *, bias: bool) -> None:
        super().__init__()
        self._owner = (owner,)
        self.out_features, self.in_features = owner.spec.shape
        self.bias = _empty_bias(owner) if bias else None

    @property
    def owner(self) -> PackedMatrix:
        return self._owner[0]

    def forward(self, input: Tensor) -> Tensor:
        return self.owner.product(input, self.bias)


def _empty_bias(owner: PackedMatrix) -> nn.Parameter:
    bias_N = torch.empty(owner.spec.shape[0], dtype=owner.dtype, device=owner.weight.device)
    return nn.Parameter(bias_N, requires_grad=False)


PACKED = (PackedMatrix, TiedEmbedding, PackedHead)
