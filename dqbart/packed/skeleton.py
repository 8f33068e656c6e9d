"""Between a model and its packed form: which modules are packed, how they are swapped, which tensors are stored.

Saving, loading and verifying all ask one function, `expected_tensors`, what a file has to hold; it walks a model
whose modules were swapped by `swap_modules`, usually on the meta device, so nothing is allocated. What is stored
where: codes as int32 words, scales as fp32, weight matrices left in float as `matrix_dtype` (fp32 unless asked
otherwise), and all other floats (positions, token types, norms, biases) as `float_dtype` (fp16).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dqbart.packed.layout import as_words, pack, pack_trits
from dqbart.packed.modules import PACKED, PackedEmbedding, PackedHead, PackedLinear, PackedMatrix, TiedEmbedding
from dqbart.packed.spec import FLOAT_DTYPES, ModuleSpec, PackedSpec
from dqbart.quant.attention import NAME, quantize_attention
from dqbart.quant.layers import FakeQuantEmbedding, FakeQuantLinear
from dqbart.quant.narrow import FIELD, narrow
from dqbart.quant.rounding import round_as_before, round_once
from dqbart.quant.sharing import keep_whole, require_tied, tie_layers

FakeQuant = FakeQuantLinear | FakeQuantEmbedding


def spec_of(student: nn.Module, *, storage: str, float_dtype: torch.dtype, matrix_dtype: torch.dtype) -> PackedSpec:
    """Describe a prepared (fake-quantized) model. Raises `ValueError` for what the format can't hold."""
    require_tied(student)
    owners: dict[int, str] = {}
    modules: dict[str, ModuleSpec] = {}
    for name, module in student.named_modules():
        if isinstance(module, FakeQuant):
            quantizer = module.quantized_weight.quantizer
            owner = owners.setdefault(id(module.weight), name)
            try:
                modules[name] = ModuleSpec(
                    kind="linear" if isinstance(module, FakeQuantLinear) else "embedding",
                    bits=quantizer.bits,
                    scheme=quantizer.scheme,
                    shape=(module.weight.shape[0], module.weight.shape[1]),
                    granularity=quantizer.granularity,
                    tied_to=None if owner == name else owner,
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    attention = [a for m in student.modules() if (a := getattr(m, "attention_numerics", None)) is not None]
    paper = any(isinstance(m, FakeQuantLinear) and not m.integer for m in student.modules())
    spec = PackedSpec(
        modules=modules,
        numerics="paper" if paper or any(a.numerics == "paper" for a in attention) else "integer",
        activation_bits=8 if attention else 32,
        probability_bits=attention[0].probability_bits if attention else 16,
        float_dtype=str(float_dtype).removeprefix("torch."),
        matrix_dtype=str(matrix_dtype).removeprefix("torch."),
    )
    return spec.with_storage(storage)


def swap_modules(model: Any, spec: PackedSpec) -> None:
    """Put packed modules where `spec` has them, in place; set attention; drop the ties that no longer exist.

    Raises `ValueError` naming the module where model and spec disagree.
    """
    if getattr(model.config, FIELD, None) is not None:
        narrow(model)  # transformers built it with all heads
    tie_layers(model)
    modules = dict(model.named_modules())
    for name, entry in sorted(spec.modules.items(), key=lambda item: item[1].tied_to is not None):
        if name not in modules:
            raise ValueError(f"modules.{name}: {type(model).__name__} has no such module")
        old: Any = modules[name]
        _require_same(name, entry, old)
        bias = getattr(old, "bias", None) is not None
        lookup: dict[str, Any] = {
            "padding_idx": getattr(old, "padding_idx", None),
            "embed_scale": getattr(old, "embed_scale", 1.0),
        }
        new: Any
        if entry.tied_to is not None:
            owner = model.get_submodule(entry.tied_to)
            new = PackedHead(owner, bias=bias) if entry.kind == "linear" else TiedEmbedding(owner, **lookup)
        else:
            arguments = (
                entry,
                spec.weight_quantizer(entry),
                spec.input_quantizer(),
                old.weight.dtype,
                old.weight.device,
            )
            new = (
                PackedLinear(*arguments, bias=bias) if entry.kind == "linear" else PackedEmbedding(*arguments, **lookup)
            )
        new.float_class = type(old)  # what `restore_modules` makes of it
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
    tie_layers(model)  # again: a shared module may have been replaced
    if spec.activation_bits == 8:
        quantize_attention(model, numerics=spec.numerics, probability_bits=spec.probability_bits)
        if spec.numerics == "integer":
            round_once(model)
    for part in model.modules():
        if hasattr(part, "all_tied_weights_keys"):
            part.all_tied_weights_keys = _remaining_ties(part, part.all_tied_weights_keys)
            part._tied_weights_keys = _remaining_ties(part, part._tied_weights_keys or {})
            part.resize_token_embeddings = _refuse_resize
            if spec.activation_bits == 8:
                part.set_attn_implementation = _keep_attention


def restore_modules(model: Any, dtype: torch.dtype) -> Any:
    """Turn packed modules back into float ones holding codes times scales: an ordinary model, in place."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, PACKED)]:
        owner = module if isinstance(module, PackedMatrix) else module.owner
        weight = owner.dequantize().to(dtype)
        if isinstance(module, PackedLinear | PackedHead):
            new: Any = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
            new.out_features, new.in_features = owner.spec.shape
            new.bias = module.bias
        else:
            new = nn.Embedding(1, 1, device="meta")
            new.num_embeddings, new.embedding_dim = owner.spec.shape
            new.padding_idx, new.embed_scale = module.padding_idx, module.embed_scale
        new.__class__ = module.float_class
        new.weight = nn.Parameter(weight, requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    tie_layers(model)
    keep_whole(model)
    round_as_before(model)
    for part in model.modules():
        for name in ("attention_numerics", "resize_token_embeddings", "set_attn_implementation", "_tied_weights_keys"):
            part.__dict__.pop(name, None)
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    if all(torch.equal(model.get_parameter(a), model.get_parameter(b)) for a, b in ties.items()):
        model.tie_weights()
    else:  # lm_head was left in float while the embedding was quantized
        model.config.tie_word_embeddings = False
    model.set_attn_implementation("sdpa")
    return model.to(dtype).requires_grad_(True)


def _require_same(name: str, entry: ModuleSpec, module: nn.Module) -> None:
    kind = "linear" if isinstance(module, nn.Linear) else "embedding" if isinstance(module, nn.Embedding) else None
    if kind != entry.kind:
        raise ValueError(f"modules.{name}: kind {entry.kind!r}, but the model has {type(module).__name__} there")
    if tuple(module.weight.shape) != entry.shape:  # type: ignore[union-attr, arg-type]
        raise ValueError(
            f"modules.{name}: shape {list(entry.shape)}, but the rest of config.json makes it "
            f"{list(module.weight.shape)}"  # type: ignore[union-attr, arg-type]
        )


def _remaining_ties(model: nn.Module, ties: dict[str, str]) -> dict[str, str]:
    def is_float(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf != "weight" or not isinstance(model.get_submodule(module), PACKED)

    return {target: source for target, source in ties.items() if is_float(target) and is_float(source)}


def _refuse_resize(new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> None:
    raise ValueError(
        f"resize_token_embeddings({new_num_tokens}): the vocabulary of a packed model is fixed; "
        "call model.dequantize() first, or resize the teacher and compress again"
    )


def _keep_attention(attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    if attn_implementation != NAME:
        raise ValueError(
            f"set_attn_implementation({attn_implementation!r}): a packed model's attention is {NAME!r}, with its own "
            "8-bit numerics; call model.dequantize() first for another one"
        )


def float_tensors(
    model: Any, matrix_dtype: torch.dtype, float_dtype: torch.dtype
) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Name, tensor and stored dtype of every float tensor that is not part of a quantized matrix."""
    vocabulary = model.config.vocab_size
    for prefix, module in model.named_modules(remove_duplicate=False):
        quantized = isinstance(module, (*PACKED, FakeQuantLinear, FakeQuantEmbedding))
        is_matrix = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary
        )
        tensors = list(module.named_parameters(recurse=False)) + [
            item for item in module.named_buffers(recurse=False) if item[0] not in module._non_persistent_buffers_set
        ]
        for leaf, tensor in tensors:
            if quantized and leaf in ("weight", "weight_scale") or not tensor.is_floating_point():
                continue
            name = f"{prefix}.{leaf}" if prefix else leaf
            yield name, tensor, matrix_dtype if is_matrix and leaf == "weight" else float_dtype


def expected_tensors(model: Any, spec: PackedSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor that the files of a swapped `model` hold, by name."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, module in spec.modules.items():
        if module.tied_to is None:
            expected[f"{name}.weight"] = (torch.int32, module.weight_shape)
            expected[f"{name}.weight_scale"] = (torch.float32, module.scale_shape)
    floats = float_tensors(model, FLOAT_DTYPES[spec.matrix_dtype], FLOAT_DTYPES[spec.float_dtype])
    for name, tensor, dtype in floats:
        if name not in model.all_tied_weights_keys:
            expected[name] = (dtype, tuple(tensor.shape))
    return expected


@torch.no_grad()
def stored_tensors(model: Any, skeleton: Any, spec: PackedSpec) -> dict[str, Tensor]:
    """The tensors to write, on CPU. `model`: a student or a packed model; `skeleton`: its swapped form."""
    state = model.state_dict()
    stored: dict[str, Tensor] = {}
    for name, (dtype, shape) in sorted(expected_tensors(skeleton, spec).items()):  # same order, same shards
        module, _, leaf = name.rpartition(".")
        entry = spec.modules.get(module)
        if entry is None or leaf not in ("weight", "weight_scale"):
            if name not in state:
                raise ValueError(f"{name}: not in the model; one of a native engine has no layers, load with 'torch'")
            tensor = state[name].detach().to(dtype)
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: holds values that {dtype} can't; store floats as float32 or mend the model")
        else:
            tensor = _packed_tensor(model.get_submodule(module), entry, leaf)
        assert tensor.shape == shape and tensor.dtype == dtype, name
        stored[name] = tensor.cpu().contiguous()
    return stored


def _packed_tensor(module: Any, entry: ModuleSpec, leaf: str) -> Tensor:
    if isinstance(module, PackedMatrix):
        return module.weight_scale if leaf == "weight_scale" else module.stored_weight(entry.layout)
    codes, scale = module.codes()
    if leaf == "weight_scale":
        return scale  # type: ignore[no-any-return]
    return as_words(pack_trits(codes) if entry.layout == "trits" else pack(codes, entry.bits))


@torch.no_grad()
def round_floats_(model: Any, dtype: torch.dtype, matrix_dtype: torch.dtype = torch.float32) -> None:
    """Give a student, in place, the values that its packed form will store and evaluate.

    Positions, token types, norms and biases are rounded to `dtype`, weight matrices left in float to
    `matrix_dtype`; quantized matrices stay. Raises `ValueError` where a value overflows.
    """
    for name, tensor, target in float_tensors(model, matrix_dtype, dtype):
        rounded = tensor.to(target).to(tensor.dtype)
        if not rounded.isfinite().all():
            raise ValueError(f"{name}: holds values that {target} can't; store floats as float32 or mend the model")
        tensor.copy_(rounded)
