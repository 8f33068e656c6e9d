"""How a student learns, method by method: a method is a row of `METHODS`, a few losses with their weights.

Which losses exist stands in `LossWeights`; which layers they compare is said there too, and decided by the recipe's
`layer_map` and `teacher_layer`. There is one trainer; adding a method is adding a row. Formulas and sources:
dqbart/distill/losses.py.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any


def number(name: str, value: Any) -> Any:
    """YAML 1.1 reads 3e-5 as text: make it the number it is. Raises `ValueError` for other text, NaN, infinity."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{name} {value!r}: expected a number") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} {value!r}: expected a finite number")
    return value


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each loss term; 0 leaves the term out (and its tensors uncomputed).

    For all models: `task` holds outputs to the labels, `logits` to the teacher's. Encoder-decoders have five more,
    DQ-BART's. Encoders have: `embedding`, hidden state 0; `hidden`, the mapped layers' hidden states; `attention` and
    `scores`, their attention maps after and before the softmax (all of these mean squared errors, through a learned
    projection where widths differ); `attention_kl`, `queries`, `keys`, `values`: MiniLM's attention and relations of
    the last layer; `cosine`, of the last hidden states; `sentence`, of the pooled ones; `order`, on plain text in pairs
    of segments: which came first (ALBERT's, of a head that is dropped afterwards).
    """

    task: float = 0.2
    logits: float = 1.0
    encoder_attention: float = 0.0
    decoder_attention: float = 0.0
    cross_attention: float = 0.0
    encoder_hidden: float = 0.0
    decoder_hidden: float = 0.0
    embedding: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    scores: float = 0.0
    attention_kl: float = 0.0
    queries: float = 0.0
    keys: float = 0.0
    values: float = 0.0
    cosine: float = 0.0
    sentence: float = 0.0
    order: float = 0.0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, number(f"losses.{f.name}", getattr(self, f.name)))
        for name, value in self.to_dict().items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e6:
                raise ValueError(f"losses.{name} {value!r}: expected a number of at least 0")
        if not self.used():
            raise ValueError("losses: all weights are 0; give at least one of them a positive weight")

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)

    def used(self) -> dict[str, float]:
        """The terms that take part."""
        return {name: weight for name, weight in self.to_dict().items() if weight}


BOTH = ("task", "logits")
OF_ENCODER_DECODERS = ("encoder_attention", "decoder_attention", "cross_attention", "encoder_hidden", "decoder_hidden")
OF_ENCODERS = tuple(f.name for f in dataclasses.fields(LossWeights) if f.name not in (*BOTH, *OF_ENCODER_DECODERS))


def only(**weights: float) -> LossWeights:
    """These terms and no others."""
    return LossWeights(**dict(task=0.0, logits=0.0) | weights)


DEPTH_LOSSES = only(logits=1.0, hidden=1.0)  # of DynaBERT's second part
PAPER_LOSSES = LossWeights(**dict.fromkeys((*BOTH, *OF_ENCODER_DECODERS), 1.0))


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to learn. `settings`: recipe fields that it sets where the user doesn't. `then`: a second method, for
    `prediction_epochs` more where there is a task. `families`: the models it is for. `elastic`: it trains the teacher's
    own shape so that parts of it are models, too.
    """

    says: str
    losses: LossWeights
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    then: str | None = None
    families: tuple[str, ...] = ("encoder",)
    learning_rate: float = 5e-5  # at width 768, in float
    elastic: bool = False


METHODS: dict[str, Method] = {
    "dq": Method(
        says="DQ-BART (arXiv 2203.11239): labels and the teacher's outputs; attention and hidden states if asked for",
        losses=LossWeights(),
        settings=dict(dropout=0.0),
        families=("encoder-decoder", "encoder"),
    ),
    "finetune": Method(
        says="labels alone, without a teacher",
        losses=only(task=1.0),
        families=("encoder-decoder", "encoder"),
    ),
    "prediction": Method(
        says="the teacher's outputs alone", losses=only(logits=1.0), families=("encoder-decoder", "encoder")
    ),
    "minilm": Method(
        says="MiniLM (arXiv 2002.10957): attention and value relations of the last layer",
        losses=only(attention_kl=1.0, values=1.0),
        learning_rate=5e-4,
    ),
    "minilm2": Method(
        says="MiniLMv2 (arXiv 2012.15828): query, key and value relations, any number of heads",
        losses=only(queries=1.0, keys=1.0, values=1.0),
        learning_rate=6e-4,
    ),
    "tinybert": Method(
        says="TinyBERT (arXiv 1909.10351): embedding, hidden states and attention scores; then predictions",
        losses=only(embedding=1.0, hidden=1.0, scores=1.0),
        settings=dict(layer_map="uniform"),
        then="prediction",
    ),
    "distilbert": Method(
        says="DistilBERT (arXiv 1910.01108): masked words, the teacher's guesses, the hidden states' direction",
        losses=only(task=2.0, logits=5.0, cosine=1.0),
        settings=dict(temperature=2.0, masking="frequency"),
        learning_rate=5e-4,
    ),
    "ternarybert": Method(
        says="TernaryBERT (arXiv 2009.12812): predictions, attention scores and all hidden states, at equal depth",
        losses=only(logits=1.0, embedding=1.0, hidden=1.0, scores=1.0),
    ),
    "dynabert": Method(
        says="DynaBERT (arXiv 2004.04037): a network whose parts, of many widths and depths, are networks, too",
        losses=only(logits=1.0, hidden=0.1),
        learning_rate=2e-5,
        elastic=True,
    ),
    "sentence": Method(
        says="sentence embeddings: the teacher's pooled ones, and the hidden states they are made of",
        losses=only(sentence=1.0, hidden=1.0),
    ),
}
