"""Words in a text, by character offsets, in any script; and which vocabulary pieces are words.

Problem: augmentation replaces words and must leave everything else as it stands, so splitting at spaces and joining
again is out: it loses line breaks, glues Chinese into one word, and a "word" of it carries its full stop along.
Method: a word is a run of letters found by a pattern, with its place. Scripts written without spaces have no such runs;
there the tokenizer's own pieces are the words: single characters for BERT's vocabularies, which cut at every Han
character, and real words for XLM-R's. Rejected: a segmenter per language, a dependency each.

Runs end at apostrophes: of "don't" and "John's", the stop words keep "don", "t" and "s", and "John" may change.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import regex

# Script extensions, so that marks shared by scripts, such as the long vowel of "コーヒー", belong to a run.
_UNSPACED = r"[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
_INSIDE = rf"[[\p{{L}}\p{{M}}\u200c\u200d]--{_UNSPACED}]"  # joiners stand inside Persian and Indic words
_RUNS = regex.compile(
    rf"(?P<unspaced>[\p{{L}}&&{_UNSPACED}][[\p{{L}}\p{{M}}]&&{_UNSPACED}]*+)"
    # not "covid" of "covid19", nor "b" of "a_1b"
    rf"|(?<![\p{{N}}_]|{_INSIDE})[\p{{L}}--{_UNSPACED}]{_INSIDE}*+(?![\p{{N}}_])",
    regex.V1,
)

ENGLISH_STOP_WORDS = frozenset(
    """
a an the this that these those some any no not nor each every either neither both all few more most other another such
own same only just even very too so than then as at by for from in into of off on onto out over to under up down upon
with without within about above across after again against along among around before behind below beneath beside
between beyond during through throughout till until toward towards via per
i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers herself
it its itself they them their theirs themselves who whom whose which what when where why how whether
am is are was were be been being have has had having do does did doing done can could may might must shall should will
would ought need dare cannot
and but or if because while although though unless since once yet also however therefore thus hence
here there now ever never always often still already
don doesn didn isn aren wasn weren hasn haven hadn won wouldn couldn shouldn mustn needn mightn shan ain
s t d m o y ll re ve
""".split()
)
_STOP_WORDS = {"en": ENGLISH_STOP_WORDS}


def stop_words(language: str) -> frozenset[str]:
    """Lower-cased words of a language (a code such as "en") that augmentation never replaces.

    Only English has a list; for any other language it is empty.
    """
    return _STOP_WORDS.get(language, frozenset())


class Word(NamedTuple):
    """`text[start:end]`, which touches the tokens `first` to `last - 1`.

    `whole` says that one mask token can stand for those tokens; `spaced` that its script is written with spaces.
    """

    start: int
    end: int
    first: int
    last: int
    whole: bool
    spaced: bool


def find_words(text: str, offsets: Sequence[tuple[int, int]]) -> list[Word]:
    """The words of `text`, in order; they never overlap.

    `offsets` are the (start, end) characters of its tokens, without special tokens. A spaced word is `whole` if it is
    one token. In scripts without spaces each token is a word, tokens that share a character are one, and tokens that
    hold anything else than letters of such scripts are none.
    """
    words = []
    trimmed = [(end - len(text[start:end].lstrip()), end) for start, end in offsets]  # "▁word" covers its space
    first = 0
    for run in _RUNS.finditer(text):
        while first < len(trimmed) and trimmed[first][1] <= run.start():
            first += 1
        last = first
        while last < len(trimmed) and trimmed[last][0] < run.end():
            last += 1
        if run["unspaced"]:
            words += _cut(run.span(), trimmed, first, last)
        else:
            whole = last - first == 1 and run.start() <= trimmed[first][0] and trimmed[first][1] <= run.end()
            words.append(Word(run.start(), run.end(), first, last, whole, spaced=True))
    return words


def _cut(span: tuple[int, int], offsets: Sequence[tuple[int, int]], first: int, last: int) -> list[Word]:
    words: list[Word] = []
    for token in range(first, last):
        start, end = offsets[token]
        if words and start < words[-1].end:  # bytes of one character, or a sentence piece's lone "▁" and what follows
            start, first = words[-1].start, words[-1].first
            end = max(end, words.pop().end)
        else:
            first = token
        words.append(Word(start, end, first, token + 1, whole=True, spaced=False))
    return [word for word in words if span[0] <= word.start < word.end <= span[1]]


def match_case(word: str, like: str) -> str:
    """`word` in lower case, UPPER CASE or with a Capital, as `like` is; as it is where that is mixed or has no case."""
    if like.islower():
        return word.lower()
    if like.isupper() and len(like) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if like.istitle() else word


class PieceWord(NamedTuple):
    """A vocabulary piece that is a whole word by itself."""

    text: str
    spaced: bool


class PieceWords:
    """Which pieces of a tokenizer's vocabulary are words, and their text.

    Families mark pieces differently: WordPiece the continuations ("##ing"), byte-level BPE and sentence pieces the
    beginnings ("Ġword", "▁word"), older BPE the ends ("word</w>"). The decoder knows, so it is asked: a piece is a word
    if it stands apart between two others. In scripts without spaces nothing stands apart: there beginnings and
    insides count alike, but not what is marked as a continuation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._other = tokenizer.tokenize(" a")
        self._beside = self._join(*self._other)
        self._special = frozenset(tokenizer.all_special_ids)
        self._known: dict[int, PieceWord | None] = {}

    def __getitem__(self, piece: int) -> PieceWord | None:
        """The word that token id `piece` is; `None` for parts of words, special tokens and all that is not letters."""
        if piece not in self._known:
            self._known[piece] = self._read(piece)
        return self._known[piece]

    def _read(self, piece: int) -> PieceWord | None:
        # models may have more rows than the tokenizer has pieces
        token = None if piece >= len(self._tokenizer) else self._tokenizer.convert_ids_to_tokens(piece)
        if token is None or piece in self._special:
            return None
        text = self._join(token)
        run = _RUNS.fullmatch(text)
        if run is None:
            return None
        if run["unspaced"]:
            return PieceWord(text, spaced=False)
        apart = self._join(*self._other, token, *self._other) == f"{self._beside} {text} {self._beside}"
        return PieceWord(text, spaced=True) if apart else None

    def _join(self, *tokens: str) -> str:
        return self._tokenizer.convert_tokens_to_string(list(tokens)).strip()
