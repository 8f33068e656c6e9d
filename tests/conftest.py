"""Shared fixtures: a small teacher folder with a tokenizer, and a data file, made once per run."""

import importlib.util
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, as transformers may

from tiny_models import tiny_encoder, tiny_seq2seq  # noqa: E402


def patch_the_language_once_a_launch() -> None:
    """Triton's interpreter patches triton.language again for every call inside a kernel, tl.max included, which takes
    more than half of its time. Within one launch the first patch of a module does.
    """
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: list[set[frozenset[int]]] = []

    def patch_once(function: Any) -> Any:
        modules = frozenset(id(value) for value in function.__globals__.values() if inspect.ismodule(value))
        if done and modules in done[-1]:
            return None
        if done:
            done[-1].add(modules)
        return patch(function)

    def one_launch(self: Any, *arguments: Any, **options: Any) -> Any:
        done.append(set())
        try:
            return launch(self, *arguments, **options)
        finally:
            done.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, one_launch


patch_the_language_once_a_launch()

# Where a shell started the tests in the background, interrupts are switched off, and for the processes under test too.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the models are tiny: threads only wait for each other

WORDS = "the a cat dog house sees likes big small red old new tree river bird walks reads book city night".split()


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


def word_tokenizer() -> Any:
    """One token per word, `<s> ... </s>` around, as BART has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(autouse=True)
def end_with_a_lost_gpu() -> Iterator[None]:
    """After an illegal access whatever the process does on the GPU fails; of several workers another one takes over."""
    yield
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny_seq2seq("bart", 3, 3, vocab_size=4 + len(WORDS), dropout=0.1)
    model.generation_config.update(max_length=12, num_beams=2)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pairs: a sentence and its first words."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"source": s, "target": " ".join(s.split()[:3])} for s in sentences(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A 2-4-8 student of a tiny BART, and its packed folder (to be read only)."""
    from test_packed_modules import student

    from dqbart.packed.checkpoint import save_packed

    model = student("bart", "2-4-8")
    return model, save_packed(model, tmp_path_factory.mktemp("bart") / "small")


@pytest.fixture
def folder(bart: tuple[Any, Path], tmp_path: Path) -> Path:
    """A fresh copy of the packed BART, to be damaged."""
    return Path(shutil.copytree(bart[1], tmp_path / "small"))


def in_two_processes(code: str, folder: Path) -> str:
    """Run `code` under torchrun with `folder` as its argument; what the processes wrote to stderr."""
    script = folder / "worker.py"
    script.write_text(code)
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(str(root / part) for part in ("", "kernels", "tests"))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, folder],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stderr


# Encoders, with data for them

FEW = dict(max_steps=4, batch_size=8, evaluations=2, dev_subset=8, max_source_length=32)


def bert_tokenizer() -> Any:
    """One token per word, `[CLS] ... [SEP]` around, with a mask."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS, "."])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    names = dict(cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=64, **names,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT for masked words."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_encoder("bert").save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that mention a dog or a cat, and say so."""
    rows = [{"sentence": text, "label": "dog" if "dog" in text else "other"} for text in sentences(300, seed=1)]
    return write(tmp_path_factory.mktemp("data") / "labelled.jsonl", rows)


@pytest.fixture(scope="session")
def classifier(bert: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `finetune` makes of the BERT: the teacher of other tests."""
    import dqbart

    recipe = dqbart.Recipe(
        bits="32-32-32",
        method="finetune",
        task="classification",
        learning_rate=1e-3,
        **FEW | dict(max_steps=150, batch_size=16, dev_subset=30),
    )  # type: ignore[arg-type]
    folder = tmp_path_factory.mktemp("out") / "classifier"
    result = dqbart.compress(bert, labelled, recipe=recipe, output=folder)
    assert "teacher" not in result.report["scores"] and "this model |" in (folder / "README.md").read_text()
    return folder
