"""Decoding many sources, the settings that are recorded, and targets that the teacher writes."""

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_seq2seq
from tokenizers import ByteLevelBPETokenizer, SentencePieceUnigramTokenizer
from torch.utils.data import DataLoader
from transformers import BartTokenizer, MBart50Tokenizer, MBartTokenizer

from dqbart.data.batches import Collator, encode_pairs
from dqbart.data.decoding import decode_batches
from dqbart.data.pseudo import write_targets
from dqbart.evaluation.generate import effective_generation, generate_texts

TEXTS = [
    "the cat sat on the mat",
    "a dog ran in the park",
    "good morning to the whole world",
    "Guten Morgen an die ganze Welt",
    "ein Hund lief durch den schönen Park",
    "die Katze saß auf der Matte",
]
SOURCES = [*TEXTS, "cat", "the dog " * 9, "die Katze lief"]


@cache
def bart_tokenizer() -> Any:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    model = json.loads(bpe.to_str())["model"]
    return BartTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])


def mbart_tokenizer(kind: Any) -> Any:
    unigram = SentencePieceUnigramTokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    unigram.train_from_iterator(TEXTS, vocab_size=60, special_tokens=specials, unk_token="<unk>")
    pieces = [(piece, score) for piece, score in json.loads(unigram.to_str())["model"]["vocab"]]
    if kind is MBart50Tokenizer:  # wants sentencepiece's own order of special tokens and makes mBART's from it
        return kind(vocab=[("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *pieces[4:]])
    return kind(vocab=pieces)


def bart(**changes: Any) -> Any:
    model = tiny_seq2seq("bart", vocab_size=len(bart_tokenizer()), **changes)
    # A random model seldom ends by itself; lengths that differ come from the settings.
    model.generation_config.update(max_length=12, num_beams=3, no_repeat_ngram_size=2, length_penalty=2.0)
    return model


def alone(model: Any, source: str, **settings: Any) -> str:
    """What transformers gives for one source, called by hand."""
    inputs = bart_tokenizer()(source, return_tensors="pt")
    ids = model.generate(**inputs, **settings)
    return bart_tokenizer().decode(ids[0], skip_special_tokens=True).strip()


# --- generate_texts


@pytest.mark.parametrize("settings", [{}, {"num_beams": 1}, {"max_length": 20, "min_length": 15}])
def test_texts_are_transformers_own_in_input_order(settings: dict[str, Any]) -> None:
    model = bart()
    expected = [alone(model, source, **settings) for source in SOURCES]
    assert len(set(expected)) > 3
    for batch_size in (1, 4, 100):
        texts = generate_texts(
            model, bart_tokenizer(), SOURCES, batch_size=batch_size, generation=settings, progress=False
        )
        assert texts == expected


def test_prefix_and_length_of_sources() -> None:
    model, tokenizer = bart(), bart_tokenizer()
    whole = generate_texts(model, tokenizer, ["say: the cat sat on the mat"])
    assert generate_texts(model, tokenizer, ["the cat sat on the mat"], source_prefix="say: ") == whole
    seen: list[int] = []
    hook = model.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate_texts(model, tokenizer, ["the dog " * 200], progress=False)
    generate_texts(model, tokenizer, ["the dog " * 200], max_source_length=1000, progress=False)
    generate_texts(model, tokenizer, ["the dog " * 200, "a"], max_source_length=10, progress=False)
    hook.remove()
    assert seen == [64, 64, 10]  # the model has 64 positions
    endless = SimpleNamespace(config=SimpleNamespace())
    with pytest.raises(ValueError, match="max_source_length None: the model has no position limit"):
        next(decode_batches(endless, tokenizer, ["a"], {}, batch_size=1))


def test_mode_is_restored_part_by_part() -> None:
    model = bart(dropout=0.5)
    expected = generate_texts(model, bart_tokenizer(), SOURCES, progress=False)
    assert not model.training
    model.train()
    model.model.encoder.eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    assert generate_texts(model, bart_tokenizer(), SOURCES, progress=False) == expected
    assert [module.training for module in model.modules()] == modes
    model.generate = lambda **inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate_texts(model, bart_tokenizer(), SOURCES, progress=False)
    assert [module.training for module in model.modules()] == modes


def test_quick_decoding_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    generate_texts(bart(), bart_tokenizer(), ["cat"], generation={"max_length": 3, "num_beams": 1})
    captured = capfd.readouterr()
    assert captured.out == "" and "decoding" not in captured.err


@pytest.mark.parametrize(
    ("sources", "batch_size", "words"),
    [
        ([], 1, "no sources to decode"),
        ("abc", 1, "sources are str; expected a list"),
        (["a", None], 1, "source 1 is NoneType"),
        (["a"], 0, "batch_size 0: expected"),
        (["a"], 2.0, "batch_size 2.0: expected"),
    ],
)
def test_bad_sources(sources: Any, batch_size: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate_texts(bart(), bart_tokenizer(), sources, batch_size=batch_size)


# --- effective_generation


def test_settings_are_complete_and_stable() -> None:
    model = bart()
    settings = effective_generation(model)
    expected = {
        "num_beams": 3, "max_length": 12, "min_length": 0, "length_penalty": 2.0, "no_repeat_ngram_size": 2,
        "early_stopping": False, "do_sample": False, "forced_eos_token_id": 2, "decoder_start_token_id": 2,
        "repetition_penalty": 1.0, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0,
    }  # fmt: skip
    assert settings.items() >= expected.items()
    assert not any(name.startswith("_") for name in settings)
    assert not {"temperature", "top_k", "use_cache", "output_scores", "transformers_version"} & settings.keys()
    assert json.loads(json.dumps(settings)) == settings
    assert effective_generation(model, settings) == settings
    expected_ids = model.generate(**bart_tokenizer()(SOURCES[0], return_tensors="pt"))
    model.generation_config = type(model.generation_config)()  # everything that matters is in the dict
    assert torch.equal(model.generate(**bart_tokenizer()(SOURCES[0], return_tensors="pt"), **settings), expected_ids)


def test_overrides_and_their_consequences(capfd: pytest.CaptureFixture[str]) -> None:
    model = bart()
    greedy = effective_generation(model, {"num_beams": 1})
    assert (greedy["num_beams"], greedy["length_penalty"]) == (1, 1.0)  # no effect in a greedy search
    sampled = effective_generation(model, {"do_sample": True, "temperature": 0.5})
    assert sampled["temperature"] == 0.5 and sampled["top_k"] == 50
    assert effective_generation(model, {"early_stopping": "never", "length_penalty": -1})["length_penalty"] == -1
    assert effective_generation(model, {"use_cache": False})["use_cache"] is False
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = 5
    settings = effective_generation(model)
    assert settings["max_new_tokens"] == 5 and "max_length" not in settings
    settings = effective_generation(model, {"max_length": 9, "num_beams": 1})  # transformers would keep the 5
    assert (settings["max_length"], settings["max_new_tokens"]) == (9, None)
    ids = model.generate(**bart_tokenizer()("cat", return_tensors="pt"), **settings)
    assert ids.shape[1] == 9 and effective_generation(model, settings) == settings
    assert "max_length" not in capfd.readouterr().err  # transformers has nothing to warn of


def test_length_where_nobody_says_one() -> None:
    model = tiny_seq2seq("bart", vocab_size=len(bart_tokenizer()))
    assert effective_generation(model)["max_length"] == 20  # transformers' own
    assert effective_generation(model, max_target_length=30)["max_length"] == 31
    assert effective_generation(model, max_target_length=1000)["max_length"] == 64  # positions
    assert effective_generation(model, {"max_length": 7}, max_target_length=30)["max_length"] == 7
    assert "max_length" not in effective_generation(model, {"max_new_tokens": 7}, max_target_length=30)
    assert effective_generation(bart(), max_target_length=30)["max_length"] == 12
    short = tiny_seq2seq("bart", vocab_size=len(bart_tokenizer()), max_position_embeddings=10)
    assert effective_generation(short)["max_length"] == 10


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_beam": 4}, "generation setting 'num_beam': did you mean 'num_beams'"),
        ({"num_beams": "4"}, "num_beams '4': expected int"),
        ({"num_beams": True}, "num_beams True: expected int"),
        ({"num_beams": None}, "num_beams None: expected int"),
        ({"num_beams": 0}, "num_beams 0: expected at least 1"),
        ({"max_length": 10.0}, "max_length 10.0: expected int"),
        ({"max_new_tokens": 0}, "max_new_tokens 0: expected at least 1"),
        ({"length_penalty": "2"}, "length_penalty '2': expected float"),
        ({"early_stopping": "always"}, "early_stopping 'always': expected bool"),
        ({"do_sample": 1}, "do_sample 1: expected bool"),
        ({"temperature": 0.7}, "temperature: no effect unless do_sample is true"),
        ({"num_return_sequences": 2}, "num_return_sequences 2: one text is written per source"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate True: one text"),
        ({"max_length": 65}, "max_length 65: the model has 64 positions"),
        ({"max_new_tokens": 1000}, "max_length 1000: the model has 64 positions"),
        ({"min_length": 13}, "min_length 13: above the maximum length 12"),
    ],
)
def test_bad_settings(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        effective_generation(bart(), overrides)
    assert "\n" not in str(error.value)


def test_a_checkpoint_with_a_bad_setting() -> None:
    model = bart()
    model.generation_config.length_penalty = "2"
    with pytest.raises(ValueError, match="length_penalty '2': expected float"):
        effective_generation(model)


# --- languages


@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer])
def test_language_start_follows_from_the_labels(kind: Any) -> None:
    """Decoding must start as training did: a tiny model learns four pairs by heart and writes them again."""
    tokenizer = mbart_tokenizer(kind)
    model = tiny_seq2seq("mbart", vocab_size=len(tokenizer), encoder=1, decoder=1)
    sources, targets = ["the cat", "a dog", "good morning", "the world"], ["die Katze", "ein Hund", "Morgen", "Welt"]
    languages: dict[str, Any] = dict(source_lang="en_XX", target_lang="de_DE")
    pairs = encode_pairs(
        tokenizer, sources, targets, max_source_length=32, max_target_length=32, progress=False, **languages
    )
    batch = Collator(tokenizer.pad_token_id)(list(pairs))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    german = tokenizer.convert_tokens_to_ids("de_DE")
    settings = effective_generation(model, tokenizer=tokenizer, target_lang="de_DE", max_target_length=32)
    first = model(**batch).logits.argmax(-1)[:, 0]  # what training predicts from the start token
    start = model.prepare_decoder_input_ids_from_labels(batch["labels"])[0, 0]
    assert settings["decoder_start_token_id"] == int(start)
    assert settings["forced_bos_token_id"] == (german if kind is MBart50Tokenizer else None)
    assert kind is MBartTokenizer or (first == german).all()
    for generation in ({"num_beams": 1}, {"num_beams": 3}):
        assert generate_texts(model, tokenizer, sources, generation=generation, batch_size=3, **languages) == targets
    # The tokenizer keeps the pair, so a model saved with it needs no codes.
    assert generate_texts(model, tokenizer, sources, generation={"num_beams": 1}) == targets


@pytest.mark.parametrize("kind", [BartTokenizer, MBartTokenizer, MBart50Tokenizer])
def test_batches_feed_the_model(kind: type) -> None:
    is_bart = kind is BartTokenizer
    tokenizer = bart_tokenizer() if is_bart else mbart_tokenizer(kind)
    languages: dict[str, Any] = {} if is_bart else dict(source_lang="en_XX", target_lang="de_DE")
    pairs = encode_pairs(
        tokenizer, TEXTS, TEXTS, max_source_length=32, max_target_length=32, progress=False, **languages
    )
    model = tiny_seq2seq("bart" if is_bart else "mbart", vocab_size=len(tokenizer))
    collate = Collator(tokenizer.pad_token_id)
    together = next(iter(DataLoader(pairs, batch_size=len(TEXTS), collate_fn=collate)))  # type: ignore[arg-type]
    with torch.no_grad():
        losses = [float(model(**collate([item])).loss) * len(item["labels"]) for item in pairs]
        loss = float(model(**together).loss) * sum(len(item["labels"]) for item in pairs)
    assert loss == pytest.approx(sum(losses), rel=1e-5)  # padding counts nowhere


def test_languages_are_needed_and_checked() -> None:
    tokenizer = mbart_tokenizer(MBartTokenizer)
    model = tiny_seq2seq("mbart", vocab_size=len(tokenizer))
    with pytest.raises(ValueError, match="MBartTokenizer needs --target-lang; known: ar_AR, cs_CZ"):
        generate_texts(model, tokenizer, ["cat"])
    with pytest.raises(ValueError, match="--target-lang 'deutsch': expected one of ar_AR"):
        generate_texts(model, tokenizer, ["cat"], source_lang="en_XX", target_lang="deutsch")
    with pytest.raises(ValueError, match="--target-lang 'de_DE': .* no language codes"):
        generate_texts(bart(), bart_tokenizer(), ["cat"], target_lang="de_DE")
    assert isinstance(bart_tokenizer(), BartTokenizer)


# --- targets by the teacher


def count_calls(model: Any, limit: int = 10**9) -> list[int]:
    """Let `generate` count its calls, and be interrupted when there are more than `limit`."""
    original = type(model).generate
    calls: list[int] = []

    def generate(**inputs: Any) -> Any:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(len(inputs["input_ids"]))
        return original(model, **inputs)

    model.generate = generate
    return calls


def test_targets_are_written_once(tmp_path: Path) -> None:
    model = bart()
    expected = generate_texts(model, bart_tokenizer(), SOURCES, batch_size=4, progress=False)
    calls = count_calls(model)
    arguments: dict[str, Any] = dict(cache_dir=tmp_path / "new" / "cache", batch_size=4, progress=False)
    assert write_targets(model, bart_tokenizer(), SOURCES, **arguments) == expected
    assert calls == [4, 4, 1]
    assert write_targets(model, bart_tokenizer(), SOURCES, **arguments) == expected
    assert calls == [4, 4, 1]
    (path,) = arguments["cache_dir"].iterdir()
    header = json.loads(path.read_text().splitlines()[0])
    assert header["generation"]["num_beams"] == 3 and header["batch_size"] == 4


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_interrupted_writing_goes_on_where_it_was(tmp_path: Path, cut: int) -> None:
    """Also when the last line was half written."""
    arguments: dict[str, Any] = dict(batch_size=2, progress=False)
    tokenizer = bart_tokenizer()
    whole = tmp_path / "whole"
    expected = write_targets(bart(), tokenizer, SOURCES, cache_dir=whole, **arguments)
    model = bart()
    count_calls(model, limit=3)
    with pytest.raises(KeyboardInterrupt):
        write_targets(model, tokenizer, SOURCES, cache_dir=tmp_path / "part", **arguments)
    (path,) = (tmp_path / "part").iterdir()
    path.write_bytes(path.read_bytes()[: -cut or None])
    model = bart()
    calls = count_calls(model)
    assert write_targets(model, tokenizer, SOURCES, cache_dir=tmp_path / "part", **arguments) == expected
    assert calls == ([2, 1] if cut == 0 else [2, 2, 1])  # the third of five batches again, if it was cut
    (original,) = whole.iterdir()
    assert path.name == original.name and path.read_bytes() == original.read_bytes()


def test_a_header_cut_short_starts_anew(tmp_path: Path) -> None:
    arguments: dict[str, Any] = dict(cache_dir=tmp_path, batch_size=4, progress=False)
    expected = write_targets(bart(), bart_tokenizer(), SOURCES, **arguments)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:20])
    assert write_targets(bart(), bart_tokenizer(), SOURCES, **arguments) == expected
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "line", [b"nonsense", b"[]", b'{"batch": 0, "rows": [0, 1], "texts": ["one"]}', b'{"rows": 3}']
)
def test_a_damaged_cache_is_refused(tmp_path: Path, line: bytes) -> None:
    arguments: dict[str, Any] = dict(cache_dir=tmp_path, batch_size=4, progress=False)
    write_targets(bart(), bart_tokenizer(), SOURCES, **arguments)
    (path,) = tmp_path.iterdir()
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(ValueError, match=r"targets-\w+.jsonl line 2: damaged; delete the file"):
        write_targets(bart(), bart_tokenizer(), SOURCES, **arguments)


def test_another_teacher_source_or_setting_is_another_file(tmp_path: Path) -> None:
    other = bart()
    with torch.no_grad():
        other.model.decoder.layers[1].fc2.bias[3] += 1e-3  # one number of one layer
    half = bart().to(torch.bfloat16)
    calls: list[tuple[Any, list[str], dict[str, Any]]] = [
        (bart(), SOURCES, {}),
        (other, SOURCES, {}),
        (half, SOURCES, {}),
        (bart(), SOURCES[::-1], {}),
        (bart(), ["".join(SOURCES)], {}),
        (bart(), SOURCES, dict(generation={"num_beams": 2})),
        (bart(), SOURCES, dict(source_prefix="x ")),
        (bart(), SOURCES, dict(max_source_length=9)),
        (bart(), SOURCES, dict(batch_size=3)),
    ]
    for number, (model, sources, changes) in enumerate(calls, 1):
        arguments: dict[str, Any] = dict(cache_dir=tmp_path, batch_size=4, progress=False) | changes
        for _ in range(2):
            write_targets(model, bart_tokenizer(), sources, **arguments)
            assert len(list(tmp_path.iterdir())) == number
    renamed = bart()
    renamed.config._name_or_path = "elsewhere"  # a folder that was moved is the same teacher
    write_targets(renamed, bart_tokenizer(), SOURCES, cache_dir=tmp_path, batch_size=4, progress=False)
    assert len(list(tmp_path.iterdir())) == len(calls)


def test_targets_in_another_language(tmp_path: Path) -> None:
    tokenizer = mbart_tokenizer(MBart50Tokenizer)
    model = tiny_seq2seq("mbart", vocab_size=len(tokenizer))
    arguments: dict[str, Any] = dict(cache_dir=tmp_path, progress=False, max_target_length=8)
    german = write_targets(model, tokenizer, SOURCES, source_lang="en_XX", target_lang="de_DE", **arguments)
    french = write_targets(model, tokenizer, SOURCES, source_lang="en_XX", target_lang="fr_XX", **arguments)
    assert german != french and len(german) == len(SOURCES) and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="needs --source-lang and --target-lang"):
        write_targets(model, mbart_tokenizer(MBart50Tokenizer), SOURCES, **arguments)
