"""What a compression run is to do: bits, layers, losses, training and storage, decided once.

A `Recipe` is a frozen value. Everything downstream reads it and nothing writes it, so `recipe.yaml` beside a
packed model says exactly how it was made. The notation is DQ-BART's (arXiv 2203.11239): bits are
weights-embeddings-activations, layers are encoder-decoder. Values that depend on the teacher (layers left out,
learning rate left out) are filled in by `dqbart.fitting.resolve` before anything runs.
"""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from dqbart.methods import DEPTH_LOSSES, METHODS, PAPER_LOSSES, LossWeights, number
from dqbart.notation import Bits, Layers

__all__ = ["LossWeights", "PAPER_LOSSES", "PRESETS", "Recipe", "read_yaml"]

T = TypeVar("T")

# What a task is scored by; the first is the default.
METRICS = {
    "seq2seq": ("rouge", "bleu"),
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("spearman", "pearson"),
    "questions": ("f1", "exact"),
    "text": ("accuracy",),
    "sentences": ("spearman", "pearson"),
    "s2s": ("rouge", "bleu"),
}
WRITES = ("seq2seq", "s2s", "questions")  # tasks that read `generation`
USUAL: dict[str, Any] = dict(temperature=1.0, layer_map="spread", masking="uniform")  # where a method has none

SHAPE = ("hidden_size", "heads", "intermediate_size", "embedding_size")
FAMILIES = ("albert", "distilbert")


def _suggest(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One compression run. Keyword-only; strings are accepted for `bits` and `layers`.

    Raises `ValueError` naming the field, the value received and the values allowed.
    """

    # The small model
    bits: Bits = Bits("2-2-8")
    layers: Layers | None = None  # None: as many as the teacher has
    numerics: Literal["integer", "paper"] = "integer"
    probability_bits: Literal[8, 16] = 16  # of attention; 16: as good as float, 8: one scale per row, as in DQ-BART
    quantize_heads: bool = False  # of encoders: pooler and classifier, too; such folders run in the torch engine
    skip: tuple[str, ...] = ()  # module name patterns left in float, such as "*.layers.0.fc2"
    storage: Literal["planar32", "trits"] = "planar32"  # trits: 1.6 bits per ternary weight on disk
    float_dtype: Literal["float16", "float32"] = "float16"  # positions, norms and biases on disk

    # Its shape, where an encoder is to be another than its teacher; None: as the teacher
    family: str | None = None  # albert or distilbert, of a BERT teacher
    hidden_size: int | None = None
    heads: int | None = None
    intermediate_size: int | None = None
    embedding_size: int | None = None  # of ALBERT's factorized embedding; None: 128
    sharing: Literal["all", "attention", "ffn", "none"] = "all"  # what ALBERT's layers share

    # DynaBERT: the shares of heads and neurons, and of layers, that parts of it have; the whole is one of them
    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    depths: tuple[float, ...] = (0.5, 0.75, 1.0)

    # What it learns from; None: as the method has it (dqbart/methods.py)
    task: str | None = None  # None: as the teacher's architecture says
    method: str = "dq"
    losses: LossWeights = None  # type: ignore[assignment]
    layer_map: str | tuple[int, ...] = None  # type: ignore[assignment]  # spread, uniform, top, bottom, or teacher layers counted from 0
    teacher_layer: int | None = None  # that MiniLM's relations look at, counted from 1; None: the last
    relation_heads: int | None = None  # of MiniLM's relations; None: as many as the teacher has heads
    logits_loss: Literal["kl", "mse"] = "kl"
    temperature: float = None  # type: ignore[assignment]

    # How long and how fast it learns
    epochs: float = 3.0  # 0: quantize without training
    prediction_epochs: float = 3.0  # of a method's second part, where it has one
    label_epochs: float = 0.0  # of DynaBERT's third part, on labels alone
    max_steps: int = 0  # of each part; above 0 it wins over epochs
    learning_rate: float | None = None  # None: by bits, method, depth and width, see fitting.py
    batch_size: int = 32
    gradient_accumulation: int = 1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    label_smoothing: float = 0.0
    dropout: float | None = None  # of the student while it learns; None: the method's, or else its config's
    bf16: bool = False
    seed: int = 28

    # Masked words of plain text, where task or logits look at words; frequency: rare first, word and ngram: whole ones
    mask_rate: float = 0.15
    masking: Literal["uniform", "frequency", "word", "ngram"] = None  # type: ignore[assignment]
    segments: Literal[1, 2] = 1  # texts in one example of plain text

    # Data; an encoder's text or first sentence is its source, its label is its target
    source_column: str | None = None
    pair_column: str | None = None
    target_column: str | None = None
    document_column: str | None = None  # of plain text: rows that belong together
    source_prefix: str = ""
    source_lang: str | None = None
    target_lang: str | None = None
    max_source_length: int = 1024
    max_target_length: int = 128

    # Model selection and scores
    metric: str | None = None  # None: the first of METRICS for the task
    language: str | None = None  # of the target text; None: of target_lang, else English, which rouge stems
    evaluations: int = 4  # dev decodings during training, the last step included; 0: the last student is kept
    dev_subset: int = 200
    eval_batch_size: int = 32
    generation: dict[str, Any] = field(default_factory=dict)  # on top of generation_config.json

    def __post_init__(self) -> None:
        for name, kind in (("bits", Bits), ("layers", Layers)):
            if isinstance(getattr(self, name), str | int):
                object.__setattr__(self, name, kind(str(getattr(self, name))))
        self._fill_from_method()
        for name in ("widths", "depths"):
            object.__setattr__(self, name, _shares(name, getattr(self, name)))
        skip = (self.skip,) if isinstance(self.skip, str) else self.skip
        if not isinstance(skip, list | tuple) or not all(isinstance(pattern, str) for pattern in skip):
            raise ValueError(f"skip {self.skip!r}: expected a list of module name patterns")
        object.__setattr__(self, "skip", tuple(skip))
        for f in dataclasses.fields(self):
            if float in (_HINTS[f.name], *get_args(_HINTS[f.name])):
                object.__setattr__(self, f.name, number(f.name, getattr(self, f.name)))
            _check_type(f.name, getattr(self, f.name), _HINTS[f.name])
        self._check_ranges()

    def _fill_from_method(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            close = _suggest(str(self.method), list(METHODS))
            raise ValueError(f"method {self.method!r}: {close}expected one of {', '.join(METHODS)}")
        method = METHODS[self.method]
        for name, value in (USUAL | method.settings).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if isinstance(self.layer_map, list):
            object.__setattr__(self, "layer_map", tuple(self.layer_map))
        if self.losses is None:
            object.__setattr__(self, "losses", method.losses)
        elif isinstance(self.losses, dict):
            object.__setattr__(self, "losses", _build(LossWeights, method.losses.to_dict() | self.losses, "losses."))

    def _check_ranges(self) -> None:
        for name in (*SHAPE, "teacher_layer", "relation_heads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected at least 1")
        if self.family not in (None, *FAMILIES):
            raise ValueError(
                f"family {self.family!r}: expected one of {', '.join(FAMILIES)}, or none: the teacher's own"
            )
        if self.task is not None and self.task not in METRICS:
            close = _suggest(self.task, list(METRICS))
            raise ValueError(f"task {self.task!r}: {close}expected one of {', '.join(METRICS)}")
        known = METRICS[self.task] if self.task else sorted({m for metrics in METRICS.values() for m in metrics})
        if self.metric is not None and self.metric not in known:
            of = f" of task {self.task!r}" if self.task else ""
            raise ValueError(f"metric {self.metric!r}{of}: expected one of {', '.join(known)}")
        if isinstance(self.layer_map, tuple) and not all(type(layer) is int for layer in self.layer_map):
            raise ValueError(f"layer_map {list(self.layer_map)!r}: expected teacher layers, counted from 0")
        at_least = {
            "epochs": 0, "prediction_epochs": 0, "label_epochs": 0, "max_steps": 0, "weight_decay": 0,
            "max_grad_norm": 0, "evaluations": 0, "batch_size": 1, "gradient_accumulation": 1, "dev_subset": 1,
            "eval_batch_size": 1, "max_source_length": 2, "max_target_length": 2,
        }  # fmt: skip
        for name, low in at_least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected at least {low}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed!r}: expected from 0 to {2**32 - 1}")
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature!r}: expected above 0")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate {self.learning_rate!r}: expected above 0")
        for name in ("warmup_ratio", "label_smoothing", "mask_rate", "dropout"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected from 0 to below 1")
        if self.storage == "trits" and 2 not in (self.bits.weights, self.bits.embeddings):
            raise ValueError(
                f"storage 'trits' with bits {self.bits}: only 2-bit (ternary) weights have trits; use 'planar32'"
            )
        if self.probability_bits == 8 and self.bits.activations != 8:
            raise ValueError(f"probability_bits 8 with bits {self.bits}: needs 8-bit activations, such as 2-2-8")
        if self.numerics == "paper" and self.bits.quantized:
            # DQ-BART's released code knows these two widths and no others (methods.md, section 1).
            if self.bits.text not in ("8-8-8", "2-2-8"):
                raise ValueError(
                    f"numerics 'paper' with bits {self.bits}: the paper has 8-8-8 and 2-2-8; use numerics 'integer'"
                )
        if self.numerics == "paper" and (self.logits_loss, self.temperature) != ("mse", 1):
            raise ValueError(
                f"logits_loss {self.logits_loss!r}, temperature {self.temperature:g} with numerics 'paper': the paper "
                "has 'mse' and 1; start from preset 'paper-2-2-8' or use numerics 'integer'"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "Recipe":
        """`Recipe.preset("paper-2-2-8", layers="6-3")`. Raises `ValueError` listing the presets."""
        if not isinstance(name, str) or name not in PRESETS:
            close = _suggest(str(name), list(PRESETS))
            raise ValueError(f"preset {name!r}: {close}expected one of {', '.join(PRESETS)}")
        values = PRESETS[name] | changes
        if isinstance(changes.get("losses"), dict) and "losses" in PRESETS[name]:  # some of them: the others stay
            values["losses"] = PRESETS[name]["losses"].to_dict() | changes["losses"]
        return _build(cls, values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Build from plain values; an optional key `preset` gives the base. Unknown keys raise."""
        values = dict(values)
        preset = values.pop("preset", None)
        return cls.preset(preset, **values) if preset is not None else _build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Recipe":
        """Read a recipe file. Raises `ValueError` naming the file and the key that is wrong."""
        return cls.from_dict(read_yaml(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON; `Recipe.from_dict` is the exact inverse."""
        values = dataclasses.asdict(self)
        values["bits"] = self.bits.text
        values["layers"] = self.layers.text if self.layers else None
        for name in ("skip", "widths", "depths"):
            values[name] = list(getattr(self, name))
        if isinstance(self.layer_map, tuple):
            values["layer_map"] = list(self.layer_map)
        return values

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def scored_by(self) -> str:
        """The metric that models are chosen by."""
        return self.metric or METRICS[self.task or "seq2seq"][0]

    @property
    def written_in(self) -> str:
        """The language of outputs and references, for scores."""
        return self.language or self.target_lang or "en"

    @property
    def terms(self) -> dict[str, float]:
        """The loss terms that take part, with their weights."""
        return self.losses.used()

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.epochs > 0 or self.max_steps > 0

    @property
    def elastic(self) -> bool:
        """Whether parts of the student, of `widths` and `depths`, are to be models, too."""
        return METHODS[self.method].elastic

    @property
    def is_narrow(self) -> bool:
        """Whether the student's shape is asked to be another than the teacher's, in more than its depth."""
        return any(getattr(self, name) is not None for name in ("family", *SHAPE))

    def stages(self) -> list["Recipe"]:
        """What is trained one after the other: the recipe, and the second part of its method on a task. DynaBERT:
        all widths, then all depths of them by other weights unless the recipe has its own, then labels.
        """
        if self.elastic:
            stages = [dataclasses.replace(self, depths=(1.0,))]
            if self.depths != (1.0,) and self.prediction_epochs:
                own = self.losses != METHODS[self.method].losses
                losses = self.losses if own else DEPTH_LOSSES
                stages.append(dataclasses.replace(self, losses=losses, epochs=self.prediction_epochs))
            if self.label_epochs:
                labels: dict[str, Any] = dict(losses=METHODS["finetune"].losses, epochs=self.label_epochs)
                stages.append(dataclasses.replace(stages[-1], **labels))
            return stages
        then = METHODS[self.method].then
        if then is None or self.task in ("text", "sentences") or not self.prediction_epochs:
            return [self]
        second = METHODS[then].losses
        if self.task == "regression":
            second = METHODS["finetune"].losses  # a soft cross-entropy of one number says nothing: labels, as released
        return [
            self,
            dataclasses.replace(self, method=then, losses=second, epochs=self.prediction_epochs),
        ]


def _shares(name: str, given: Any) -> tuple[float, ...]:
    shares = [number(name, share) for share in given] if isinstance(given, list | tuple) else [given]
    right = all(type(share) in (int, float) and 0 < share <= 1 for share in shares)
    if not right or not isinstance(given, list | tuple) or 1 not in shares or len({*shares}) < len(shares):
        raise ValueError(
            f"{name} {given!r}: expected a list of shares above 0 to 1, each once; 1, the whole network, is one of them"
        )
    return tuple(map(float, shares))


_HINTS = get_type_hints(Recipe)

_PAPER: dict[str, Any] = dict(
    numerics="paper", probability_bits=8, losses=PAPER_LOSSES, logits_loss="mse", learning_rate=3e-5,
    epochs=20.0, batch_size=8, gradient_accumulation=16, max_grad_norm=0.0, dropout=0.1,  # bart-base's
)  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "small": dict(bits="2-2-8"),  # the default: 2 bits everywhere
    "cautious": dict(bits="2-4-8"),  # a 4-bit vocabulary matrix costs a little size and saves most of the loss
    "tiny": dict(bits="1-1-8"),
    "int8": dict(bits="8-8-8", epochs=1.0),
    "ternarybert": dict(bits="2-2-8", method="ternarybert"),
    "paper-8-8-8": _PAPER | dict(bits="8-8-8"),
    "paper-2-2-8": _PAPER | dict(bits="2-2-8"),
}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping from a YAML file. Raises `ValueError` naming the file for anything else."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such recipe file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, found {type(values).__name__}")
    return values


def _build(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    allowed = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in allowed:
            raise ValueError(f"recipe key {prefix}{key}: {_suggest(str(key), allowed)}allowed: {', '.join(allowed)}")
    return cls(**values)


def _check_type(name: str, value: Any, hint: Any) -> None:
    """One rule for all fields: the annotation is what is allowed (int passes for float)."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise ValueError(f"{name} {value!r}: expected one of {', '.join(map(repr, get_args(hint)))}")
        return
    parts = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    kinds: list[type] = [get_origin(part) or part for part in parts]
    accepted = tuple(kinds) + ((int,) if float in kinds else ())
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} {value!r}: expected {names}, found {type(value).__name__}")
