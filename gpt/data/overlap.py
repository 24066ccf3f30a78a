"""
Which n-grams, n words in a row, of some texts stand in another, which may have any length.

Words are lower-case letters and digits; what is between them does not count. n-grams never reach
over the end of a document. They are compared as 64-bit hashes, made in numpy for a whole piece of
text at once.
"""

import re
from functools import lru_cache

import numpy as np

MARK = b'\xff'          # stands between documents; UTF-8 has no such byte
ASCII = bytes(10 if b == 255 else b if b > 127 else ord(chr(b).lower()) if chr(b).isalnum() else 32
              for b in range(256))
FACTOR = 0x9E3779B97F4A7C15


def normalize(raw):
    """The words of `raw` between blanks, and a line end for every MARK."""
    text = raw.translate(ASCII)
    return text if text.isascii() else re.sub(rb'[\x80-\xfe]+', lambda run: fold(run[0]), text)


@lru_cache(2 ** 16)
def fold(run):
    """A run of other characters, as normalize() has it; case folding looks at no neighbours."""
    return re.sub(r'[\W_]', ' ', run.decode('utf-8', 'replace').casefold()).encode()


@lru_cache(8)
def powers(base, size):
    return np.cumprod(np.full(size, base, np.uint64))


def hashed(text):
    """(the hash of every word of a normalized text, the words before which a document ended).

    A word is a polynomial in its bytes. They are multiplied by powers that go on through the whole
    text, summed, and divided by the power at which the word begins.
    """
    codes = np.frombuffer(b' ' + text + b' ', np.uint8)
    inside, size = codes > 32, 1 << len(codes).bit_length()
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1           # of words: begin, end, begin …
    ends = np.searchsorted(edges[::2], np.flatnonzero(codes == 10))
    if not len(edges):
        return np.empty(0, np.uint64), ends
    sums = np.add.reduceat(codes * powers(FACTOR, size)[:len(codes)], edges)[::2]
    words = sums * powers(pow(FACTOR, -1, 2 ** 64), size)[edges[::2]]
    words = (words ^ (words >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return words ^ (words >> np.uint64(32)), ends


def ngrams(words, ends, n):
    """(the hash of every n words in a row, whether no document ends within them)."""
    size = max(0, len(words) - n + 1)
    grams, whole = words[:size].copy(), np.ones(size, bool)
    for i in range(1, n):
        grams *= np.uint64(FACTOR)
        grams += words[i:size + i]
        within = ends - i
        whole[within[(within >= 0) & (within < size)]] = False
    return grams, whole


def ngrams_of(texts, n):
    """(the hashes of all n-grams of these texts in order, which text each is of)."""
    hashes, of = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for first in range(0, len(texts), 256):
        raw = MARK.join(text.encode() for text in texts[first:first + 256])
        words, ends = hashed(normalize(raw))
        grams, whole = ngrams(words, ends, n)
        hashes.append(grams[whole])
        of.append(first + np.searchsorted(ends, np.flatnonzero(whole), side='right'))
    return np.concatenate(hashes), np.concatenate(of)


def distinct(hashes):
    """Each of the hashes once, sorted (np.unique, which hashes them anew, takes longer)."""
    hashes = np.sort(hashes)
    return hashes[np.r_[True, hashes[1:] != hashes[:-1]][:len(hashes)]]


def look_up(pieces, known):
    """Which n-grams, {n: distinct hashes, sorted}, stand in a text: {n: array of bool}.

    pieces: its bytes, in pieces that end between words, documents parted by MARK. The last words of
    a piece are read again with the next one. Of the hashes a table of their upper 24 bits lets only
    a few through to the binary search.
    """
    found = {n: np.zeros(len(hashes), bool) for n, hashes in known.items()}
    maybe = {n: np.zeros(2 ** 24, bool) for n in known}
    for n, hashes in known.items():
        maybe[n][hashes >> np.uint64(40)] = True
    words, ends = hashed(b'')
    for raw in pieces:
        words = words[max(len(words) - max(known) + 1, *ends[-1:], 0):]
        more, ends = hashed(normalize(raw))
        words, ends = np.concatenate([words, more]), ends + len(words)
        for n, hashes in known.items():
            grams, whole = ngrams(words, ends, n)
            grams = grams[whole & maybe[n][grams >> np.uint64(40)]]
            places = np.minimum(np.searchsorted(hashes, grams), len(hashes) - 1)
            found[n][places[hashes[places] == grams]] = True
    return found


def longest(hits, grams, of, most):
    """[(text, first n-gram in it, how many in a row)] of the longest runs of hits among the n-grams
    of texts (see ngrams_of); a run that shares an n-gram with a longer one is left out."""
    here, runs = np.arange(len(hits)), []
    begin = np.searchsorted(of, of)                                 # of each one's text
    missed = np.maximum.accumulate(np.where(hits, -1, here)) if len(hits) else here
    length = here - np.maximum(missed, begin - 1)
    while len(runs) < most and len(hits) and length.max() > 0:
        last, size = int(length.argmax()), int(length.max())
        first = last - size + 1
        runs.append((int(of[last]), first - int(begin[last]), size))
        length[np.isin(grams, grams[first:last + 1])] = 0
    return runs
