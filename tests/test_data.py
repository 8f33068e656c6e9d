"""Files and objects to rows, rows to columns, texts to batches."""

import csv
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import TEXTS, bart_tokenizer, mbart_tokenizer
from transformers import BartTokenizer, DataCollatorForSeq2Seq, MBart50Tokenizer, MBartTokenizer

from dqbart.data import files
from dqbart.data.batches import Collator, encode_pairs, language_codes, set_languages
from dqbart.data.columns import Columns, Examples, guess_columns, hold_out, read_examples, sample
from dqbart.data.files import list_splits, load_rows
from dqbart.data.formats import SUFFIXES
from dqbart.data.splits import read_split, train_and_dev
from dqbart.recipe import Recipe

ROWS = [
    {"source": 'a "quoted", text\nin two lines', "target": "été 中文\u2028x"},
    {"source": "second\ttab", "target": "zwei"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the form that the file's name says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    opened = gzip.open(path, "wt", encoding="utf-8", newline="") if path.suffix == ".gz" else None
    with opened or path.open("w", encoding="utf-8", newline="") as file:
        if name.endswith((".csv", ".tsv")):
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


# --- files


@pytest.mark.parametrize("name", [f"rows{s}" for s in SUFFIXES if "txt" not in s] + ["ROWS.CSV"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    if name == "ROWS.CSV":
        (tmp_path / name).write_bytes(write(tmp_path / "rows.csv", ROWS).read_bytes())
        path = tmp_path / name
    else:
        path = write(tmp_path / name, ROWS)
    assert load_rows(path) == ROWS
    assert load_rows(str(path), split="validation") == ROWS  # one file has no splits
    assert list_splits(path) == ["train"]


def test_json_array_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    assert load_rows(tmp_path / "a.json") == ROWS
    for indent in (None, 2):
        (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=indent), encoding="utf-8")
        assert load_rows(tmp_path / "d.json") == ROWS
    (tmp_path / "d.json").write_text('{"a": "x", "data": [1]}\n')
    assert load_rows(tmp_path / "d.json") == [{"a": "x", "data": [1]}]
    (tmp_path / "d.json").write_text('\n{"data": []}\n{"data": [{}]}\n')
    assert load_rows(tmp_path / "d.json") == [{"data": []}, {"data": [{}]}]
    lines = "\n\n".join(json.dumps(row) for row in ROWS)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n \n")
    assert load_rows(tmp_path / "b.jsonl") == ROWS


@pytest.mark.parametrize(
    ("fields", "quoted"),
    [
        (['"A fine" movie', '"', 'an "open'], False),  # GLUE's: not swallowed up to the next quote
        (['"hello', 'bye"'], False),
        (['"say ""hi"""', "plain"], True),  # pandas'
        (['"a\ttab"', "plain"], True),
        (['"two\nlines"', "plain"], True),
    ],
)
def test_quotes_in_tsv(fields: list[str], quoted: bool, tmp_path: Path) -> None:
    text = "sentence\tlabel\n" + "".join(f"{field}\t1\r\n" for field in fields)
    (tmp_path / "a.tsv").write_bytes(text.encode())
    plain = [field[1:-1].replace('""', '"') if field.startswith('"') else field for field in fields]
    wanted = [{"sentence": field, "label": "1"} for field in (plain if quoted else fields)]
    assert load_rows(tmp_path / "a.tsv") == wanted


def test_large_csv_field_and_pandas_index_column(tmp_path: Path) -> None:
    text = "word " * 40_000  # 200,000 characters; the csv module's default limit is 131,072
    (tmp_path / "a.csv").write_text(f"\ufeff,source,target\n0,{text},t\n\n", encoding="utf-8")
    assert load_rows(tmp_path / "a.csv") == [{"": "0", "source": text, "target": "t"}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: there are no rows in it"),
        ("a.csv", b"source,target\n", "a.csv: there are no rows in it"),
        ("a.json", b"[]", "a.json: there are no rows in it"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": 1,}\n', "a.jsonl line 3: invalid JSON, .* at column 9"),
        ("a.jsonl", b'{"a": "x\n"}', "a.jsonl line 1: invalid JSON, Invalid control character|Unterminated"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}]', "a.json line 3: invalid JSON, Expecting ':' delimiter at column 6"),
        ("a.json", b'\n\n[{"a" 2}]', "a.json line 3: invalid JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl line 2: expected an object .*, found list"),
        ("a.json", b'[{"a": 1}, "b"]', "found str"),
        ("a.jsonl", b"[" * 100_000, "line 1: JSON is nested too deeply|line 1: invalid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xfc"}\n', "a.jsonl line 2: not UTF-8"),
        ("a.csv", b"a,b\n1,2\n\n1,2,3\n", r"a.csv line 4: 3 fields, but the first line names 2: \['a', 'b'\]"),
        ("a.csv", b'a,b\n"1\n1",2\n1\n', "a.csv line 4: 1 fields, but"),
        ("a.csv", b"a,a\n1,2\n", "a.csv line 1: two columns have the same name"),
        (
            "a.csv",
            b"text;summary\nthe cat;cat\n",
            "a.csv: one column, 'text;summary': it seems to be divided by ';', ex",
        ),
        ("a.csv", b"a\tb\n1\t2\n", r"it seems to be divided by '\\t', expected ','; save it as csv with commas"),
        ("a.tsv", b"a,b\n1,2\n", r"it seems to be divided by ',', expected '\\t'"),
        (
            "a.tsv",
            b'a\tb\n"He" said\tx\n1\n',
            "a.tsv line 2: .*quotes doubled, or every line must have as many tabs as",
        ),
        (
            "a.csv",
            b"a,b\r1,2\r",
            r"a.csv line 1: a lone carriage return \(\\r\) ends a line; save the file with \\n, or",
        ),
        ("a.tsv", b"a\tb\n1\r\t2\n", "a.tsv line 2: a lone carriage return"),
        (
            "a.json",
            b'{\n"train": [{"a": 1}],\n"n": 2}',
            "a.json: valid JSON, but one object with 'train', 'n'; expected",
        ),
        ("a.json", b'{\n"a": 1,\n}', "a.json line [23]: invalid JSON"),
        ("a.json", b'{"data": [1]}\n{"data": 2\n', "a.json line 2: invalid JSON, Expecting ',' delimiter at column 11"),
        ("a.json", b'"a"', 'a.json line 1: expected an object such as {"source": "..."}, found str'),
        ("a.csv", b'a,b\n1,2\n"open,2\n3,4\n', "a.csv line 3: .*quotes doubled"),
        ("a.xlsx", b"PK", "a.xlsx: unknown kind of file '.xlsx'; expected one of .csv, .csv.gz, .tsv"),
        ("a.csv.gz", b"a,b\n", "a.csv.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "b"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz: not a whole gzip file"),
        ("a.parquet", b"PAR1 nonsense", "a.parquet: not a readable parquet file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load_rows(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize("data", ["none.jsonl", "no/such/dir/none.csv", "/nowhere", "~/nowhere-at-all/x", "a b", ""])
def test_missing_file(data: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_rows(data)


def test_folder_of_splits(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl.gz", ROWS)
    write(tmp_path / "dev.csv", ROWS[:1])
    write(tmp_path / "test-00001-of-00002.jsonl", ROWS[1:])
    write(tmp_path / "test-00000-of-00002.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("not data")
    assert list_splits(tmp_path) == ["train", "validation", "test"]
    assert load_rows(tmp_path) == load_rows(tmp_path, split="test") == ROWS
    assert load_rows(tmp_path, split="validation") == load_rows(tmp_path, split="dev") == ROWS[:1]
    with pytest.raises(ValueError, match="split 'training': expected one of train, validation, test"):
        load_rows(tmp_path, split="training")
    write(tmp_path / "dev.tsv", ROWS)
    with pytest.raises(ValueError, match="several validation files .dev.csv, dev.tsv.; give the path of one"):
        load_rows(tmp_path)
    for name in ("dev.csv", "dev.tsv"):
        (tmp_path / name).unlink()
    for name in ("validation_matched", "validation_mismatched"):  # shards of two splits
        write(tmp_path / f"{name}-00000-of-00001.jsonl", ROWS)
    with pytest.raises(ValueError, match="several validation files"):
        load_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no train file in this folder"):
        load_rows(tmp_path / "empty")


def test_objects(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    assert load_rows(dataset) == load_rows(ROWS) == load_rows(iter(ROWS)) == load_rows(tuple(ROWS)) == ROWS
    splits = datasets.DatasetDict(train=dataset, test=dataset.select([1]))
    assert load_rows(splits, split="test") == ROWS[1:]
    assert list_splits(splits) == ["train", "test"]
    with pytest.raises(ValueError, match="no split 'validation'; it has 'train', 'test'"):
        load_rows(splits, split="validation")
    for wrong, words in ((None, "data is NoneType"), (3, "data is int"), (b"x", "data is bytes")):
        with pytest.raises(ValueError, match=words):
            load_rows(wrong)
    with pytest.raises(ValueError, match="data: row 2 is str, expected a dict"):
        load_rows([ROWS[0], "text"])
    with pytest.raises(ValueError, match="data: there are no rows"):
        load_rows([])


def test_hub_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    cache_dir = str(tmp_path / "cache")
    dataset = files._hub(str(folder), None, split="train", cache_dir=cache_dir)
    assert load_rows(dataset) == ROWS
    assert load_rows(files._hub(str(folder), None, cache_dir=cache_dir)) == ROWS
    with pytest.raises(ValueError, match="hub data set it can't be read .*owner/name:configuration"):
        files._hub(str(folder), None, split="nowhere", cache_dir=cache_dir)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for ask in (load_rows, list_splits):
        with pytest.raises((ValueError, FileNotFoundError), match="'no-one/nothing': no such file or folder"):
            ask("no-one/nothing:some-configuration")


# --- columns


@pytest.mark.parametrize(
    ("row", "source", "target", "references"),
    [
        ({"id": "7", "article": "a", "highlights": "b"}, "article", "highlights", None),
        ({"Document": "a", "Summary": "b", "id": 1}, "Document", "Summary", None),
        ({"article": "a", "abstract": "b"}, "article", "abstract", None),
        ({"title": "b", "abstract": "a"}, "abstract", "title", None),
        ({"text": "a", "summary": "b", "title": "c"}, "text", "summary", None),
        ({"text": "a", "doc": "b", "kind": "c"}, "text", None, None),
        ({"source": "a", "target": "b", "references": ["b", "c"]}, "source", "target", "references"),
        ({"source": "a", "target": ["b", "c"]}, "source", None, "target"),
        ({"translation": {"de": "a", "en": "b"}}, "translation.en", "translation.de", None),
        ({"translation": {"fr": "a", "de": "b"}, "id": 1}, "translation.fr", "translation.de", None),
        ({"de": "a", "en": "b", "id": "c"}, "en", "de", None),
        ({"anything": "a", "label": 1}, "anything", None, None),
        ({"text": 3, "words": "a"}, "words", None, None),  # a column that holds no text is no source
        ({"source": None, "target": ""}, None, None, None),
    ],
)
def test_guessing(row: dict[str, Any], source: str | None, target: str | None, references: str | None) -> None:
    if source is None:
        with pytest.raises(ValueError, match="no source column recognised among 'source', 'target'; give --source"):
            guess_columns([row])
    else:
        assert guess_columns([row]) == Columns(source, target, references, guessed=True)


def test_guess_looks_past_missing_values_and_keeps_given_names() -> None:
    rows: list[dict[str, Any]] = [{"text": None, "b": "x"}, {"text": "t", "b": "x", "summary": "s"}]
    assert guess_columns(rows) == Columns("text", "summary", None, True)
    assert guess_columns(rows, "b") == Columns("b", "summary", None, True)
    assert guess_columns(rows, target="text", source="summary") == Columns("summary", "text", None, False)
    assert guess_columns(rows[:1] * 2, target="b", source="text").target == "b"
    two: list[dict[str, Any]] = [{"one": "a", "two": "b"}]
    with pytest.raises(ValueError, match="no source column recognised among 'one', 'two'"):
        guess_columns(two)
    assert guess_columns(two, target="two").source == "one"


def test_languages_name_columns() -> None:
    rows: list[dict[str, Any]] = [{"source": "wiki", "ro": "a", "en": "b", "de": "c"}]
    columns = guess_columns(rows, source_lang="de_DE", target_lang="ro_RO")
    assert (columns.source, columns.target) == ("de", "ro")
    rows = [{"translation": {"en_XX": "a", "de_DE": "b", "fr": "c"}}]
    columns = guess_columns(rows, source_lang="de_DE", target_lang="en_XX")
    assert (columns.source, columns.target) == ("translation.de_DE", "translation.en_XX")
    assert read_examples(rows, columns).targets == ["a"]


def test_wrong_column_names_the_columns_and_the_flag() -> None:
    rows = [{"article": "a", "highlights": "b"}]
    with pytest.raises(
        ValueError, match=r"column 'article1' \(--source-column\) .*'article', 'highlights'; did you mean"
    ):
        guess_columns(rows, source="article1")
    with pytest.raises(ValueError, match=r"column 'zzz' \(--target-column\) .* which has 'article', 'highlights'$"):
        guess_columns(rows, target="zzz")
    with pytest.raises(ValueError, match="'article' is given as source and as target"):
        guess_columns(rows, "article", "article")
    assert "--source-column" in str(guess_columns(rows)) and "\n" not in str(guess_columns(rows))
    assert "guessed" not in str(guess_columns(rows, "article", "highlights"))


def test_reading_examples() -> None:
    rows: list[dict[str, Any]] = [
        {"source": "a", "target": "b", "references": ["b", " ", "c"]},
        {"source": " \n", "target": "b", "references": ["b"]},
        {"source": "c", "target": None, "references": ["d"]},
        {"source": "e", "target": "f"},
    ]
    examples = read_examples(rows, guess_columns(rows))
    assert examples == Examples(["a", "e"], ["b", "f"], [["b", "c"], ["f"]], skipped=2)
    only = read_examples(rows, Columns("source", None, "references"))
    assert only.targets == ["b", "d"] and only.references == [["b", "c"], ["d"]]
    assert read_examples(rows, Columns("source")) == Examples(["a", "c", "e"], skipped=1)
    with pytest.raises(ValueError, match="row 1: column 'n' holds int, expected text"):
        read_examples([{"n": 3}], Columns("n"))
    with pytest.raises(ValueError, match="row 2: column 'r' holds '.*', expected a list of texts"):
        read_examples([{"s": "a", "r": ["a"]}, {"s": "a", "r": "ab"}], Columns("s", None, "r"))
    with pytest.raises(ValueError, match="all 2 rows are empty there"):
        read_examples([{"s": ""}, {"s": None}], Columns("s"))
    with pytest.raises(ValueError, match="row 1: column 's' has half a surrogate pair at character 1"):
        read_examples(json.loads('[{"s": "a\\ud800"}]'), Columns("s"))


def test_hold_out_keeps_equal_sources_together() -> None:
    sources = [f"text {i % 30}" for i in range(90)]
    examples = Examples(sources, [str(i) for i in range(90)])
    rest, held = hold_out(examples, 10)
    assert 10 <= len(held) <= 12 and len(rest) + len(held) == 90
    assert not set(rest.sources) & set(held.sources)
    assert rest.targets is not None and list(map(int, rest.targets)) == sorted(map(int, rest.targets))
    more = Examples([*sources, "new"], None)
    assert set(hold_out(more, 10)[1].sources) <= set(held.sources) | {"new"}
    for count in (0, -1, 90, 1000):
        with pytest.raises(ValueError, match=f"can't hold out {count} of 90 examples .30 different"):
            hold_out(examples, count)
    with pytest.raises(ValueError, match=r"can't hold out 1 of 2 .* equal ones together\); give --dev-data"):
        hold_out(Examples(["same", "same"]), 1)


def test_a_crowd_of_equal_sources_stays_for_training() -> None:
    for other in range(40):  # wherever its hash puts the crowd
        examples = Examples([f"crowd {other}"] * 900 + [f"text {i}" for i in range(100)])
        rest, held = hold_out(examples, 10)
        assert len(held) == 10 and len(rest) == 990
        assert len(sample(examples, 10)) == 10
    rest, held = hold_out(Examples([f"text {i % 4}" for i in range(64)]), 6)  # no group is small
    assert len(held) == 16 and not set(rest.sources) & set(held.sources)


def pairs_of(targets: list[str], folder: Path) -> Path:
    return write(folder / "pairs.jsonl", [{"source": f"s{i}", "target": text} for i, text in enumerate(targets)])


def test_targets_that_are_not_english_need_a_language(tmp_path: Path) -> None:
    recipe = Recipe(source_column="source", target_column="target")
    chinese = pairs_of(["这是一本书 (2021)", "猫 sat"], tmp_path)
    with pytest.raises(
        ValueError, match=r"written in a to z, and as English they would score 0; give --language, such"
    ):
        read_split(chinese, recipe, "train")
    for given in ({"language": "zh"}, {"source_lang": "en_XX", "target_lang": "zh_CN"}):
        assert len(read_split(chinese, dataclasses.replace(recipe, **given), "train")) == 2
    assert recipe.written_in == "en" and Recipe(target_lang="zh_CN").written_in == "zh_CN"
    assert Recipe(target_lang="zh_CN", language="ja").written_in == "ja"
    for fine in (["Grüße, ähnlich"], ["42", "17"]):
        assert len(read_split(pairs_of(fine, tmp_path), recipe, "train")) == len(fine)


@pytest.mark.parametrize("labelled", [("validation",), ("train", "validation"), ("train",)])
def test_a_validation_split_is_used_if_it_can_be_scored(labelled: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    for split, count in (("train", 40), ("validation", 5)):
        rows = [{"source": f"{split} {i}"} | ({"target": "t"} if split in labelled else {}) for i in range(count)]
        write(tmp_path / f"{split}.jsonl", rows)
    recipe = Recipe(source_column="source")

    def read(data: Any, split: str) -> Examples:
        return read_split(data, recipe, split)

    train, dev = train_and_dev(read, tmp_path, None, recipe, lambda e: hold_out(e, 4), lambda e: e.targets is not None)
    assert train is not None and len(train) == 40
    if "validation" in labelled:
        assert dev is not None and len(dev) == 5
    else:
        assert dev is None and "the validation split has nothing to score against: left out" in capsys.readouterr().err


# --- batches


def test_encoding_is_the_tokenizers_own() -> None:
    tokenizer = bart_tokenizer()
    targets = [text.upper() for text in TEXTS]
    pairs = encode_pairs(
        tokenizer, TEXTS, targets, max_source_length=64, max_target_length=64, source_prefix="do: ", progress=False
    )
    assert len(pairs) == len(TEXTS) and pairs.cut_sources == pairs.cut_targets == 0
    for item, source, target in zip(pairs, TEXTS, targets, strict=True):
        assert item["input_ids"] == tokenizer("do: " + source)["input_ids"]
        assert item["attention_mask"] == [1] * len(item["input_ids"])
        assert item["labels"] == tokenizer(text_target=target)["input_ids"]
    assert pairs[-1] == pairs[len(TEXTS) - 1]
    with pytest.raises(IndexError):
        pairs[len(TEXTS)]
    assert "labels" not in encode_pairs(tokenizer, TEXTS, max_source_length=9, progress=False)[0]


def test_more_texts_than_one_chunk_stay_in_order() -> None:
    tokenizer = bart_tokenizer()
    texts = [f"{i} " + "the cat " * (i % 7) for i in range(2503)]
    pairs = encode_pairs(tokenizer, texts, texts, max_source_length=99, max_target_length=99, progress=False)
    for index in (0, 999, 1000, 1001, 2502):
        assert pairs[index]["labels"] == tokenizer(texts[index])["input_ids"]


@pytest.mark.parametrize("kind", [BartTokenizer, MBartTokenizer, MBart50Tokenizer])
def test_cutting_keeps_special_tokens_and_is_counted(kind: type) -> None:
    is_bart = kind is BartTokenizer
    tokenizer = bart_tokenizer() if is_bart else mbart_tokenizer(kind)
    languages: dict[str, Any] = {} if is_bart else dict(source_lang="en_XX", target_lang="de_DE")
    texts = ["cat", "the cat sat on the mat and ran and ran"]
    exact = len(tokenizer("cat")["input_ids"])
    pairs = encode_pairs(
        tokenizer, texts, texts, max_source_length=exact, max_target_length=exact, progress=False, **languages
    )
    assert (pairs.cut_sources, pairs.cut_targets) == (1, 1)  # the first fits exactly
    assert "50.0 % cut" in str(pairs) and str(pairs).startswith("2 examples; source tokens mean")
    specials = {"input_ids": tokenizer("")["input_ids"], "labels": tokenizer(text_target="")["input_ids"]}
    for item in pairs:
        for key, special in specials.items():
            assert len(item[key]) == exact
            assert [i for i in item[key] if i in special] == special


@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer])
def test_language_codes(kind: Any, tmp_path: Path) -> None:
    tokenizer = mbart_tokenizer(kind)
    codes = language_codes(tokenizer)
    assert len(codes) in (25, 52) and codes["de_DE"] == tokenizer.convert_tokens_to_ids("de_DE")
    pairs = encode_pairs(
        tokenizer, ["cat"], ["Katze"], max_source_length=9, max_target_length=9,
        source_lang="ro_RO", target_lang="de_DE", progress=False,
    )  # fmt: skip
    assert codes["ro_RO"] in pairs[0]["input_ids"] and codes["de_DE"] not in pairs[0]["input_ids"]
    assert codes["de_DE"] in pairs[0]["labels"] and codes["ro_RO"] not in pairs[0]["labels"]
    tokenizer.save_pretrained(tmp_path)  # the pair travels with the tokenizer
    again = encode_pairs(
        kind.from_pretrained(tmp_path), ["cat"], ["Katze"], max_source_length=9, max_target_length=9, progress=False
    )
    assert again[0] == pairs[0]


def test_languages_are_checked() -> None:
    tokenizer = mbart_tokenizer(MBartTokenizer)
    with pytest.raises(ValueError, match="--target-lang 'de': expected one of ar_AR, cs_CZ, de_DE,"):
        set_languages(tokenizer, "en_XX", "de")
    with pytest.raises(ValueError, match="--source-lang '<s>': expected one of"):
        set_languages(tokenizer, "<s>", "de_DE")
    for pair in ((None, None), ("en_XX", None), (None, "de_DE")):
        with pytest.raises(ValueError, match="MBartTokenizer needs --source-lang and --target-lang"):
            set_languages(tokenizer, *pair)
    with pytest.raises(ValueError, match="--source-lang 'en_XX': .* has no language codes; leave it out"):
        set_languages(bart_tokenizer(), "en_XX", "de_DE")
    set_languages(bart_tokenizer(), None, None)


def test_encoding_errors() -> None:
    tokenizer = bart_tokenizer()
    with pytest.raises(ValueError, match="2 sources but 1 targets"):
        encode_pairs(tokenizer, ["a", "b"], ["c"], max_source_length=9, max_target_length=9)
    with pytest.raises(ValueError, match="no sources to encode"):
        encode_pairs(tokenizer, [], [], max_source_length=9, max_target_length=9)
    with pytest.raises(ValueError, match="max_source_length 2: expected above 2"):
        encode_pairs(tokenizer, ["a"], max_source_length=2)
    with pytest.raises(ValueError, match="max_target_length 0: expected above 2"):
        encode_pairs(tokenizer, ["a"], ["b"], max_source_length=9)
    bare = BartTokenizer(vocab=tokenizer.get_vocab())
    bare.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="ends targets without its end token '</s>'"):
        encode_pairs(bare, ["a"], ["b"], max_source_length=9, max_target_length=9)


def test_collator_agrees_with_transformers_and_pads_right() -> None:
    tokenizer = bart_tokenizer()
    pairs = encode_pairs(tokenizer, TEXTS, TEXTS[::-1], max_source_length=9, max_target_length=7, progress=False)
    items = list(pairs)
    ours = Collator(tokenizer.pad_token_id)(items)
    theirs = DataCollatorForSeq2Seq(tokenizer)(items)
    assert ours.keys() == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    left = bart_tokenizer()
    left.padding_side = "left"
    try:
        assert torch.equal(Collator(left.pad_token_id)(items)["input_ids"], ours["input_ids"])
    finally:
        left.padding_side = "right"
    rounded = Collator(tokenizer.pad_token_id, multiple_of=8)(items)
    assert rounded["input_ids"].shape[1] == 16 and rounded["labels"].shape[1] == 8
    assert (rounded["labels"][:, 7:] == -100).all() and (rounded["attention_mask"][:, 9:] == 0).all()
