"""n-grams of texts in another, against plain readings in Python."""

import random
import re

import numpy as np

from gpt.data import overlap

STRANGE = ['It’s', '“naïve”', 'co-op', 'snake_case', "don't", 'ÉCOLE', '３', '42', 'Straße', 'ΣΑΣ',
           '北京', 'a', 'b', 'the', 'x²', '—', 'İstanbul', '…', 'n', 't', '_', '‘tis', 'e\u0301']


def plain_words(text):
    return re.findall(r'[^\W_]+', text.casefold())


def plain_ngrams(text, n):
    words = plain_words(text)
    return [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]


def strange_text(rng, most):
    """A text of few different words, so that n-grams recur, with all kinds of separators."""
    between = [' ', ' ', '\n', ', ', ' — ', '_', "'", '”', '  ']
    return ''.join(rng.choice(STRANGE) + rng.choice(between) for _ in range(rng.randrange(most)))


def test_normalized_words_are_those_of_a_plain_reading():
    rng = random.Random(1)
    for _ in range(300):
        text = strange_text(rng, 30)
        assert overlap.normalize(text.encode()).decode().split() == plain_words(text)
    every = ''.join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x30000)]))
    assert overlap.normalize(every.encode()).decode().split() == plain_words(every)


def test_look_up_finds_exactly_the_ngrams_of_a_text():
    """In pieces of any size, and never across the end of a document."""
    rng = random.Random(7)
    texts = [text for text in (strange_text(rng, 40) for _ in range(30)) if text.strip()]
    items = [strange_text(rng, 30) for _ in range(20)] + [texts[0] + texts[1], texts[2], '']
    hashes, of = overlap.ngrams_of(items, 3)
    known = {3: np.unique(hashes)}
    plain = [(gram, i) for i, text in enumerate(items) for gram in plain_ngrams(text, 3)]
    present = {gram for text in texts for gram in plain_ngrams(text, 3)}
    assert of.tolist() == [i for _, i in plain]
    raw = overlap.MARK.join(text.encode() + b' ' for text in texts)
    for size in (1, 3, len(raw)):
        words = re.findall(rb'[^ \xff]*[ \xff]|[^ \xff]+', raw)
        pieces = [b''.join(words[i:i + size]) for i in range(0, len(words), size)]
        found = overlap.look_up(pieces, known)[3][np.searchsorted(known[3], hashes)]
        assert found.tolist() == [gram in present for gram, _ in plain] and 0 < found.sum()
