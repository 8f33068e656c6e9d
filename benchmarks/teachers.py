"""Trains full-precision teachers from scratch, so that compression can be shown without a download.

    python benchmarks/teachers.py demo|tatoeba|arxiv-title --out DIR [--data DIR] [--minutes N]

`demo` is the teacher that ships (docstring headlines), `tatoeba` one mBART for en->de and en->fr, `arxiv-title` a BART
that titles abstracts. A tokenizer is trained on the training texts, then the model: denoising first where the task has
minutes for it, then the task itself (teacher_training.py). What is scored is what lies on disk, on the whole test set.
Writes the checkpoint, its tokenizer and teacher.json; rerunning the same command resumes. The last line is JSON.
"""

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from teacher_training import BOS, EOS, PAD, Crew, Denoiser, Example, Task, Training, mimetic_
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    RobertaTokenizer,
)
from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES

from dqbart.data.docstrings import load_docstrings
from dqbart.data.files import load_rows
from dqbart.evaluation import metrics

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in BART and mBART
POSITIONS = 256
TASKS = {
    "demo": Task(False, 160, 5, 6144, 192, 48, {"mask": 4, "infill": 8, "task": 48}, half=True),
    "tatoeba": Task(True, 192, 6, 8192, 64, 64, {"task": 40}, learning_rate=1.2e-3),
    "arxiv-title": Task(False, 192, 6, 8192, 128, 48, {"mask": 4, "task": 56}),
}
ON_CUDA = {"d_model": 512, "heads": 8, "batch_tokens": 16000, "learning_rate": 5e-4}  # the demo's size is fixed

Rows = list[dict[str, Any]]


@dataclass
class Data:
    """Rows with `source`, `target` (and `references`) per language code, "" where there is one language."""

    train: dict[str, Rows]
    validation: dict[str, Rows]
    test: dict[str, Rows]
    texts: list[str] = field(default_factory=list)  # for denoising

    def sizes(self) -> dict[str, dict[str, int]]:
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: {code or "pairs": len(rows) for code, rows in part.items()} for name, part in splits.items()}


def load_data(name: str, folder: Path) -> Data:
    if name == "demo":
        found = load_docstrings()
        return Data({"": found.train}, {"": found.validation}, {"": found.test}, found.texts)
    sets = {"de_DE": "tatoeba-en-de", "fr_XX": "tatoeba-en-fr"} if name == "tatoeba" else {"": name}
    splits: dict[str, dict[str, Rows]] = {
        split: {code: load_rows(folder / subset, split=split) for code, subset in sets.items()}
        for split in ("train", "validation", "test")
    }
    texts = [row["source"] for row in splits["train"][""]] if name == "arxiv-title" else []
    return Data(splits["train"], splits["validation"], splits["test"], texts)


def train_tokenizer(task: Task, texts: list[str], folder: Path) -> None:
    """Byte-level BPE for BART; Unigram with mBART-50's language codes for mBART."""
    if task.multilingual:
        trained = Tokenizer(models.Unigram())
        trained.pre_tokenizer = pre_tokenizers.Metaspace()
        unigram = trainers.UnigramTrainer(
            vocab_size=task.vocabulary - len(FAIRSEQ_LANGUAGE_CODES) - 1,
            special_tokens=SPECIAL,
            unk_token="<unk>",
            show_progress=False,
        )
        trained.train_from_iterator(texts, unigram)
        pieces = json.loads(trained.to_str())["model"]["vocab"]
        pieces += [[code, 0.0] for code in FAIRSEQ_LANGUAGE_CODES] + [["<mask>", 0.0]]
        tokenizer = MBart50Tokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="de_DE", model_max_length=task.max_source)
    else:
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=task.vocabulary - 1,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        bpe = json.loads(trained.to_str())["model"]
        vocabulary = bpe["vocab"] | {"<mask>": len(bpe["vocab"])}
        merges = [tuple(merge) for merge in bpe["merges"]]
        tokenizer = RobertaTokenizer(vocab=vocabulary, merges=merges, model_max_length=task.max_source)
    tokenizer.save_pretrained(folder)


def build_model(task: Task, vocab_size: int) -> Any:
    sizes = {
        "vocab_size": vocab_size,
        "d_model": task.d_model,
        "max_position_embeddings": POSITIONS,
        "encoder_layers": task.layers,
        "decoder_layers": task.layers,
        "encoder_attention_heads": task.heads,
        "decoder_attention_heads": task.heads,
        "encoder_ffn_dim": 4 * task.d_model,
        "decoder_ffn_dim": 4 * task.d_model,
        "dropout": 0.1,
        "decoder_start_token_id": EOS,
    }
    if task.multilingual:  # labels are `code text </s>`; the model wraps their end to the decoder's start
        model = MBartForConditionalGeneration(MBartConfig(**sizes, scale_embedding=True))
    else:
        model = BartForConditionalGeneration(BartConfig(**sizes))
    mimetic_(model)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        max_length=task.max_target,
        num_beams=4,
        early_stopping=True,
        forced_bos_token_id=None if task.multilingual else BOS,  # mBART: the target's code, given per call
        forced_eos_token_id=EOS,
        decoder_start_token_id=EOS,
    )
    return model


def encode(task: Task, tokenizer: Any, parts: dict[str, Rows]) -> list[Example]:
    examples: list[Example] = []
    for code, rows in parts.items():
        if code:
            tokenizer.tgt_lang = code
        sources = tokenizer([row["source"] for row in rows], truncation=True, max_length=task.max_source)
        targets = tokenizer(text_target=[row["target"] for row in rows], truncation=True, max_length=task.max_target)
        examples += zip(sources.input_ids, targets.input_ids, strict=True)
    return examples


def generate(model: Any, tokenizer: Any, sources: list[str], crew: Crew, **settings: Any) -> list[str]:
    """Texts for `sources`, in their order; batches alike in length, shared out among the workers."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    chunks = [order[start : start + 32] for start in range(0, len(order), 32)]
    inputs = [
        tokenizer([sources[i] for i in chunk], truncation=True, padding=True, return_tensors="pt").to(model.device)
        for chunk in chunks
    ]
    found = crew.map(lambda batch: model.generate(**batch, **settings), inputs)
    texts = [""] * len(sources)
    for chunk, ids in zip(chunks, found, strict=True):
        for i, text in zip(chunk, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()
    return texts


def first_sentence(text: str) -> str:
    """What a summarizer must beat: the first sentence, at most 20 words."""
    return " ".join(re.split(r"(?<=[.!?])\s", text)[0].split()[:20])


def score(folder: Path, data: Data, device: torch.device, crew: Crew) -> dict[str, Any]:
    """Scores of what lies in `folder`, computed in fp32, per test set and decoding."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores: dict[str, Any] = {}
    for code, rows in data.test.items():
        sources, targets = [row["source"] for row in rows], [row["target"] for row in rows]
        extra = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(code)} if code else {}
        texts: dict[str, list[str]] = {} if code else {"first sentence": [first_sentence(text) for text in sources]}
        for name, beams in (("greedy", 1), ("beam 4", 4)):
            texts[name] = generate(model, tokenizer, sources, crew, num_beams=beams, early_stopping=beams > 1, **extra)
        for name, outputs in texts.items():
            key = f"{code} {name}".strip()
            scores[key] = metrics.score("bleu" if code else "rouge", outputs, targets)
            if code:
                accepted = [row["references"] for row in rows]
                scores[f"{key}, all references"] = metrics.score("bleu", outputs, accepted)
        for i in range(0, len(rows), len(rows) // 6 + 1):
            print(f"source: {sources[i]}\n  target: {targets[i]}\n  output: {texts['beam 4'][i]}")
    for key, value in scores.items():
        print(f"{key}: {value}", flush=True)
    return {key: {k: v for k, v in value.to_dict().items() if k != "generation"} for key, value in scores.items()}


def save_model(model: Any, task: Task, folder: Path) -> None:
    """In fp16 where the task says so; config.json still names float32, so that loading computes in fp32."""
    (model.half() if task.half else model).cpu().save_pretrained(folder)
    if task.half:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a full-precision teacher from scratch, on CPU or one GPU.")
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the teacher, and of the state to resume from"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds tatoeba-en-de and the other sets")
    parser.add_argument("--minutes", type=float, help="training time in all, shared out among the phases as by default")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    crew = Crew(args.threads if device.type == "cpu" else 1)
    task = TASKS[args.task]
    if device.type == "cuda" and args.task != "demo":
        task = replace(task, **ON_CUDA)  # type: ignore[arg-type]
    if args.minutes:
        share = args.minutes / sum(task.minutes.values())
        task = replace(task, minutes={phase: share * minutes for phase, minutes in task.minutes.items()})
    data = load_data(args.task, args.data)
    work = args.out / "training"
    work.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        rows = [row for part in data.train.values() for row in part]
        texts = dict.fromkeys(data.texts + [row[key] for row in rows for key in ("source", "target")])
        train_tokenizer(task, list(texts), args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = build_model(task, len(tokenizer)).to(device)
    parameters = model.num_parameters()
    print(f"{data.sizes()}\n{task}\n{parameters:,} parameters, {device}", flush=True)

    train = encode(task, tokenizer, data.train)
    sources: dict[str, Callable[[int], list[Example]]] = {"task": lambda epoch: train}
    for kind in task.minutes.keys() & {"mask", "infill"}:
        sources[kind] = Denoiser(task, tokenizer, data.texts, kind).examples
    validation = encode(task, tokenizer, {code: rows[:1000] for code, rows in data.validation.items()})
    state = Training(model, task, crew, work / "state.pt").run(sources, validation)
    save_model(model, task, args.out)
    scores = score(args.out, data, device, crew)
    card = {
        "task": args.task,
        "scores": scores,
        "generation": f"whole test set; max_length {task.max_target}; greedy, or beam 4 with early_stopping",
        "validation_loss": state["best"],
        "parameters": parameters,
        "settings": asdict(task),
        "phases": state["history"],
        "wall_minutes": round(state["wall"] / 60, 1),
        "device": f"CPU, {crew.workers} threads" if device.type == "cpu" else torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "examples": data.sizes(),
    }
    (args.out / "teacher.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps({"out": str(args.out), "scores": {key: value["values"] for key, value in scores.items()}}))


if __name__ == "__main__":
    main()
