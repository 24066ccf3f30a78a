"""
Encodings against GPT-2's real one, against transformers' reading of our tokenizer.json,
and round trips.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers
from conftest import ROOT

from gpt import tokenizer
from gpt.tokenizer import EOT, build, encode, fingerprint, from_json, to_json

TEXT = ("The import statement's two forms.\n\n    x = 1\t# don't, we'll see\n"
        "naïve café 世界 😀😀 12,345 <|endoftext|> \x00 end  \n") * 3


def every_kind():
    return [build('bpe:400', lambda: [TEXT]), build('bytes', None), build('chars', lambda: [TEXT])]


@pytest.mark.parametrize('encoding', every_kind(), ids=lambda encoding: encoding.name)
def test_round_trip_and_the_same_ids_in_transformers(encoding):
    ids = encode(encoding, TEXT)
    assert ids.dtype == np.uint16 and encoding.decode(ids.tolist()) == TEXT
    theirs = tokenizers.Tokenizer.from_str(to_json(encoding))
    plain = TEXT.replace(EOT, '')                   # transformers takes it for the special token
    assert (theirs.encode(plain).ids == encode(encoding, plain).tolist()
            and theirs.decode(encode(encoding, plain)) == plain)
    again = from_json(to_json(encoding))
    assert fingerprint(again) == fingerprint(encoding) and again.eot == encoding.eot
    assert encode(again, TEXT).tolist() == ids.tolist()


# tiktoken's ids are those of the `tokenizers` library, and so of transformers.

WORDS = ['the', ' the', 'there', 'other', 'abcab', 'ab', 'a' * 9, 'a' * 300, 'ing', 'ly', 'é', 'ß',
         'naïve', '世界', '世' * 50, '😀', '👩‍👩‍👧', 'न्', '\u0301', 'א', '12', '٣', '½', 'Ⅷ', '1' * 40,
         "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", '’s', '.', '...', '!?', '-' * 30,
         '_', '$', '<|', '|>', ' ', '  ', ' ' * 20, '\n', '\n\n', '\r\n', '\t', '\v', '\f', '\x1c',
         '\x1f', '\x85', '\xa0', '\u1680', '\u180e', '\u2003', '\u2028', '\u200b', '\u3000',
         '\ufeff', '\0', '\x7f', '\ufffd', '\U0010ffff']


def odd_strings(count, seed):
    """Random strings: of words and signs on which tokenizers have differed, and of any
    characters."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = rng.choices(WORDS, k=rng.randrange(9))
        if rng.random() < 0.3:
            top = rng.choice([0x80, 0x800, 0xd800, 0x110000])
            codes = (rng.randrange(top) for _ in range(rng.randrange(9)))
            parts += [chr(code) for code in codes if not 0xd800 <= code < 0xe000]
            rng.shuffle(parts)
        yield ''.join(parts)


def kinds_with_merges(request):
    return {'gpt2': lambda: request.getfixturevalue('gpt2'), 'bytes': lambda: build('bytes', None),
            'bpe:700': lambda: build('bpe:700', lambda: [*odd_strings(500, seed=1), TEXT])}


def assert_equal(encoding, texts):
    theirs = tokenizers.Tokenizer.from_str(to_json(encoding))
    found = theirs.encode_batch_fast(texts, add_special_tokens=False)
    for text, one in zip(texts, found):
        assert one.ids == encoding.encode_ordinary(text), repr(text)


@pytest.mark.parametrize('kind', ['gpt2', 'bpe:700', 'bytes'])
def test_odd_strings_have_the_same_ids_in_both_libraries(kind, request):
    """And characters of Unicode among letters, digits, signs and spaces. With `make fuzz` a million
    strings, and all characters."""
    encoding, examples = kinds_with_merges(request)[kind](), int(os.environ['FUZZ'])
    for seed in range(max(2, examples // 40)):
        assert_equal(encoding, list(odd_strings(10_000, seed=seed)))
    for start in range(0, 0x110000, 0x8000):
        codes = range(start, start + 0x8000, max(1, 4000 // examples))
        assert_equal(encoding, [f'a{char}b {char}1{char}. {char}{char}  {char}' for char in map(
            chr, codes) if not '\ud800' <= char < '\ue000'])


def test_trained_merges_that_tiktoken_would_not_follow_are_left_to_the_library():
    """Files of our form, in which a token cannot be reached from its bytes, or in two ways."""
    base = json.loads(to_json(tokenizer.byte_pairs('bytes', [])))

    def made(*merges):
        vocab = {token: i for token, i in base['model']['vocab'].items() if token != EOT}
        vocab |= {left + right: 256 + i for i, (left, right) in enumerate(merges)}
        return from_json(json.dumps({**base, 'model': {
            **base['model'], 'vocab': {**vocab, EOT: len(vocab)}, 'merges': merges},
            'added_tokens': [{**base['added_tokens'][0], 'id': len(vocab)}]}))
    good = made(('a', 'b'), ('ab', 'c'))
    assert isinstance(good, tokenizer.BytePairs) and encode(good, 'abc').tolist() == [257]
    for merges in ([('a', 'b'), ('b', 'c'), ('a', 'bc')],       # 'abc' is 'ab', 'c' by its merges
                   [('b', 'c'), ('a', 'b'), ('ab', 'c')]):
        other = made(*merges)
        assert isinstance(other, tokenizer.HFTokenizer)
        theirs = tokenizers.Tokenizer.from_str(to_json(other))
        assert encode(other, 'abc abc').tolist() == theirs.encode('abc abc').ids


# Training.

def test_a_run_of_equal_letters_is_trained_on_in_a_moment():
    """Its tokens have a longest length."""
    started = time.process_time()
    encoding = build('bpe:2000', lambda: ['a' * 100_000 + ' ' + 'abc' * 100_000, '世' * 30_000])
    assert time.process_time() - started < 20
    assert max(map(len, tokenizer.token_bytes(encoding))) <= tokenizer.LONGEST_TOKEN
    assert_equal(encoding, ['a' * 5000, 'abc' * 900, '世' * 70, *odd_strings(300, seed=5)])
    started = time.process_time()
    assert to_json(from_json(to_json(encoding))) == to_json(encoding)
    assert time.process_time() - started < 2


def test_the_file_of_gpt2_is_made_once(gpt2):
    assert tokenizer.gpt2() is gpt2 and to_json(gpt2) is to_json(gpt2)


def test_ctrl_c_is_answered_while_a_tokenizer_is_trained():
    """By the thread that waits; what trains ends with the program."""
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.interruptible(lambda: time.sleep(8))
    assert time.monotonic() - started < 6


@pytest.mark.slow
def test_ctrl_c_ends_training_a_tokenizer_at_once(real, tmp_path):
    process = subprocess.Popen([sys.executable, 'data/prepare.py', f'--data_dir={tmp_path}',
                                '--name=d', '--tokenizer=bpe:30000', real('books')],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert '(90 files, ' in process.stdout.readline()
    assert 'training the tokenizer' in process.stdout.readline()
    time.sleep(3)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130 and time.monotonic() - started < 5
    assert 'the same command resumes' in process.stdout.read()


def test_an_error_of_the_corpus_ends_training_as_itself():
    def broken():
        yield 'some text'
        raise ValueError('a.txt: not UTF-8')
    with pytest.raises(ValueError, match='a.txt: not UTF-8'):
        build('bpe:300', broken)


def test_gpt2_gives_the_ids_of_gpt2(gpt2):
    encoding = gpt2
    ids = encode(encoding, "Hello, I'm a language model,").tolist()
    assert ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert encoding.eot == 50256 and encoding.n_vocab == 50257
    assert fingerprint(encoding).startswith('2548045ac46b8ad1')     # data sets are tied to it
    again = from_json(to_json(encoding))
    assert (fingerprint(again) == fingerprint(encoding)
            and (encode(again, TEXT) == encode(encoding, TEXT)).all())
    assert again.name == 'gpt2'


def test_training_is_repeatable_and_vocabulary_has_the_size_asked_for():
    a, b = (build('bpe:300', lambda: [TEXT, 'more text']) for _ in range(2))
    assert fingerprint(a) == fingerprint(b) and a.n_vocab == 300 and a.eot == 299
    assert fingerprint(a) != fingerprint(build('bpe:301', lambda: [TEXT, 'more text']))


def test_end_of_text_in_a_text_is_text():
    encoding = build('bytes', None)
    assert encoding.eot not in encode(encoding, f'a{EOT}b')


def test_chars_are_the_sorted_characters_and_have_no_end_of_text():
    encoding = build('chars', lambda: ['cab', 'é\n'])
    assert encode(encoding, '\nabcé').tolist() == [0, 1, 2, 3, 4] and encoding.eot is None


@pytest.mark.parametrize('name, words', [
    ('gpt3', "given 'gpt3', expected"), ('bpe:x', "given 'bpe:x', expected"),
    ('bpe:70000', '65,536'), ('bpe:100', 'at least bpe:257')])
def test_refusals(name, words):
    with pytest.raises(ValueError, match=words):
        build(name, lambda: [TEXT])


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match="the character 'ß' is not one of the 3"):
        encode(build('chars', lambda: ['abc']), 'aß')


def test_without_network_and_cache_the_error_says_which_files_go_where(tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr('tiktoken.load.read_file',
                        lambda *_: (_ for _ in ()).throw(ConnectionError('no network')))
    words = 'vocab.bpe as 6d1cbeee.*TIKTOKEN_CACHE_DIR.*bpe:4096 needs no network'
    with pytest.raises(ValueError, match=words):
        tokenizer.gpt2.__wrapped__()


def test_ids_that_do_not_fit_16_bits_are_refused():
    """Some multilingual GPT-2s have 100,000 tokens."""
    data = json.loads(to_json(build('bytes', None)))
    data['model']['vocab']['aa'] = 2 ** 16
    with pytest.raises(ValueError, match='65,537 tokens do not fit the 16 bits'):
        from_json(json.dumps(data))


def test_the_older_pair_of_files_is_the_same_tokenizer(tmp_path):
    made = tokenizer.build('bpe:300', lambda: ['the cat and the hat sat on the mat '] * 9)
    model = json.loads(tokenizer.to_json(made))['model']
    (tmp_path / 'vocab.json').write_text(json.dumps(
        model['vocab'] | {tokenizer.EOT: made.eot_token}))
    (tmp_path / 'merges.txt').write_text('\n'.join(
        ['#version: 0.2', *(' '.join(pair) for pair in model['merges'])]))
    found = tokenizer.build(str(tmp_path), None)                    # as `--tokenizer=FOLDER` does
    assert tokenizer.fingerprint(found) == tokenizer.fingerprint(made)
    (tmp_path / 'merges.txt').unlink()
    with pytest.raises(ValueError, match='cannot be used as a tokenizer'):
        tokenizer.load(tmp_path / 'vocab.json')


PARTS = ['a', 'ab', 'the', ' ', '  ', '\n', '\r\n', '\t', '\u3000', '\x85', "'s", "'", '12', '世界',
         'é', '.', '!?', '\x1c', '\0', '<|endoftext|>', '<|', '🙂']


@pytest.mark.parametrize('name', ['gpt2', 'bpe:300', 'bytes'])
def test_pieces_and_batches_of_documents_encode_as_one_text_at_a_time(name, request, monkeypatch):
    """Against tiktoken's encode_ordinary of each text."""
    if name == 'gpt2':
        request.getfixturevalue('gpt2')
    encoding, rng = tokenizer.build(name, lambda: ['the ab 12 ab the ab ' * 9]), random.Random(3)
    texts = [''.join(rng.choices(PARTS, k=rng.randrange(60))) for _ in range(300)]
    expected = [encoding.encode_ordinary(text) for text in texts]
    for piece in (1, 3, 10, 2 ** 18):
        monkeypatch.setattr(tokenizer, 'PIECE', piece)
        assert [tokenizer.encode(encoding, text).tolist() for text in texts] == expected
        for some in ([], texts, [text for text in texts if '<|e' not in text]):
            ids = tokenizer.encode_documents(encoding, some).tolist()
            assert ids == [id for text in some
                           for id in [encoding.eot, *encoding.encode_ordinary(text)]]


def test_very_long_white_space_is_encoded():
    """tiktoken 0.14 alone gives up on this ('Max stack size exceeded for backtracking')."""
    encoding = tokenizer.build('bytes', list)
    text = 'a' + ' ' * 1_500_000 + 'b\t' + '\n' * 1_500_000
    assert encoding.decode(tokenizer.encode(encoding, text).tolist()) == text
