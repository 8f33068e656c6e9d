"""The transformers side: a quantization config and a quantizer named "dqbart".

transformers builds the model on the meta device, hands it to us with the checkpoint's files, and then loads tensors
by name. We swap the modules (so names and shapes agree with the files), hold the files to the result (transformers
itself only warns about missing tensors, and fills them with random numbers), and let it load. No method is
overridden that changed between transformers 5.17 and 5.23.
"""

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dqbart.packed.modules import PackedMatrix
from dqbart.packed.shards import metadata, read_shard
from dqbart.packed.skeleton import expected_tensors, restore_modules, stored_tensors, swap_modules
from dqbart.packed.spec import QUANT_METHOD, PackedSpec
from dqbart.packed.verify import check_files, require_state, state_of, unchanged


class DqbartConfig(QuantizationConfigMixin):
    """transformers' face of a `PackedSpec`. Raises `ValueError` for fields that don't fit the format."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD
        try:
            self.spec = PackedSpec.from_dict({"quant_method": QUANT_METHOD} | values)
        except ValueError as error:
            raise ValueError(f"config.json: quantization_config: {error}") from None

    @classmethod
    def of(cls, spec: PackedSpec) -> "DqbartConfig":
        return cls(**spec.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_dict()


class DqbartQuantizer(HfQuantizer):
    """Loads and saves packed models. They run; they don't train."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("quantization_config 'dqbart' given at load: make a packed folder with dqbart compress")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("state_dict given at load: packed models are loaded from their folder's safetensors")
        spec: PackedSpec = self.quantization_config.spec  # type: ignore[has-type]
        prefix = ""
        if type(model).__name__ not in (model.config.architectures or []) and model.base_model is model:
            prefix = f"{model.base_model_prefix}."  # the body of a model that was saved with its head
            spec = spec.inside(prefix)
            self.quantization_config = DqbartConfig.of(spec)
        self.folder = Path(checkpoint_files[0]).parent
        self.state = state_of(self.folder)  # transformers opens the files again, once they were checked
        found = [read_shard(Path(file)) for file in checkpoint_files]
        try:
            swap_modules(model, spec)
        except ValueError as error:
            raise ValueError(f"{self.folder / 'config.json'}: {error}") from None
        with unchanged(self.folder):
            check_files(found, expected_tensors(model, spec), spec, prefix=prefix)
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        require_state(self.folder, self.state)
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(self.dtypes[name])  # 5.17 casts no tensor that it renamed
        for module in model.modules():
            if isinstance(module, PackedMatrix):
                module.expand()
        return model.requires_grad_(False)

    def get_state_dict_and_metadata(self, model: Any, **kwargs: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        spec: PackedSpec = self.quantization_config.spec
        tensors = stored_tensors(model, model, spec)
        return tensors, metadata(tensors, spec.format_version)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return restore_modules(model, dtype or torch.float32)

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Enter both classes into transformers' registries, once."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(DqbartConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(DqbartQuantizer)
