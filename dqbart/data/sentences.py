"""Texts to sentences, by one rule for all languages.

ROUGE-Lsum and pairs of consecutive segments need sentences, and they should mean the same. The usual nltk model was
rejected: it must be downloaded, knows few languages, and two versions of it disagree.
"""

import regex

_SENTENCE_END = regex.compile(r"[。！？｡]+[\p{Pe}\p{Pf}\"']*\s*|[.!?…؟۔।॥]+[\p{Pe}\p{Pf}\"']*\s+")


def split_sentences(text: str) -> list[str]:
    """Sentences by one rule for all languages: a sentence ends

    at a line end; after `.`, `!`, `?`, `…`, `؟`, `۔`, `।` or `॥`, with quotes or brackets that
    close there, before white space, unless a lower-case letter follows; and after `。`, `！`, `？`,
    with or without white space.
    """
    sentences: list[str] = []
    for line in text.splitlines():
        start = 0
        for match in _SENTENCE_END.finditer(line):
            if not line[match.end() : match.end() + 1].islower():
                sentences.append(line[start : match.end()].strip())
                start = match.end()
        sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]
