"""
Which n-grams (n words in a row) of some texts appear in another text of any length.

Words are lower-case letters and digits; anything else only separates them. An n-gram never crosses
the end of a document. n-grams are compared as 64-bit hashes, computed in numpy for a whole piece
of text at once.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

MARK = b'\xff'          # separates documents; UTF-8 has no such byte
ASCII = bytes(10 if b == 255 else b if b > 127 else ord(chr(b).lower()) if chr(b).isalnum() else 32
              for b in range(256))
FACTOR = 0x9E3779B97F4A7C15


def normalize(raw: bytes) -> bytes:
    """The words of `raw` separated by spaces, and a line end for every MARK."""
    text = raw.translate(ASCII)
    return text if text.isascii() else re.sub(rb'[\x80-\xfe]+', lambda run: fold(run[0]), text)


@lru_cache(2 ** 16)
def fold(run: bytes) -> bytes:
    """A run of characters beyond ASCII, normalized; case folding needs no context."""
    return re.sub(r'[\W_]', ' ', run.decode('utf-8', 'replace').casefold()).encode()


@lru_cache(8)
def powers(base: int, size: int) -> np.ndarray:
    return np.cumprod(np.full(size, base, np.uint64))


def hashed(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(the hash of every word of a normalized text, indices of the words that follow an end).

    A word is a polynomial in its bytes: bytes times powers that run through the whole text, summed,
    and divided by the power at the beginning of the word.
    """
    codes = np.frombuffer(b' ' + text + b' ', np.uint8)
    inside, size = codes > 32, 1 << len(codes).bit_length()
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1           # of words: start, end, start …
    ends = np.searchsorted(edges[::2], np.flatnonzero(codes == 10))
    if not len(edges):
        return np.empty(0, np.uint64), ends
    sums = np.add.reduceat(codes * powers(FACTOR, size)[:len(codes)], edges)[::2]
    words = sums * powers(pow(FACTOR, -1, 2 ** 64), size)[edges[::2]]
    words = (words ^ (words >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return words ^ (words >> np.uint64(32)), ends


def ngrams(words: np.ndarray, ends: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(the hash of every n words in a row, whether no document ends within them)."""
    size = max(0, len(words) - n + 1)
    grams, unbroken = words[:size].copy(), np.ones(size, bool)
    for i in range(1, n):
        grams *= np.uint64(FACTOR)
        grams += words[i:size + i]
        within = ends - i
        unbroken[within[(within >= 0) & (within < size)]] = False
    return grams, unbroken


def ngrams_of(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(the hashes of all n-grams of these texts in order, the index of the text of each)."""
    hashes, of = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for first in range(0, len(texts), 256):
        raw = MARK.join(text.encode() for text in texts[first:first + 256])
        words, ends = hashed(normalize(raw))
        grams, unbroken = ngrams(words, ends, n)
        hashes.append(grams[unbroken])
        of.append(first + np.searchsorted(ends, np.flatnonzero(unbroken), side='right'))
    return np.concatenate(hashes), np.concatenate(of)


def look_up(pieces: Iterable[bytes], known: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Which of the n-grams {n: distinct hashes, sorted} appear in a text: {n: array of bool}.

    pieces: the text, in pieces that end between words, with MARK between documents. The last words
    of a piece are read again with the next one. A table of the upper 24 bits of the hashes spares
    most n-grams the binary search.
    """
    found = {n: np.zeros(len(hashes), bool) for n, hashes in known.items()}
    possible = {n: np.zeros(2 ** 24, bool) for n in known}
    for n, hashes in known.items():
        possible[n][hashes >> np.uint64(40)] = True
    words, ends = hashed(b'')
    for raw in pieces:
        words = words[max(len(words) - max(known) + 1, *ends[-1:], 0):]
        more, ends = hashed(normalize(raw))
        words, ends = np.concatenate([words, more]), ends + len(words)
        for n, hashes in known.items():
            grams, unbroken = ngrams(words, ends, n)
            grams = grams[unbroken & possible[n][grams >> np.uint64(40)]]
            places = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
            found[n][places[hashes[places] == grams]] = True
    return found
