"""
Encodings against GPT-2's real one, against transformers' reading of our tokenizer.json,
and round trips.
"""

import json
import random

import numpy as np
import pytest

from gpt import tokenizer
from gpt.tokenizer import EOT, build, encode, eot_id, fingerprint, from_json, to_json

TEXT = ("The import statement's two forms.\n\n    x = 1\t# don't, we'll see\n"
        "naïve café 世界 😀😀 12,345 <|endoftext|> \x00 end  \n") * 3


def gpt2_or_skip():
    try:
        return tokenizer.gpt2()
    except ValueError as error:
        pytest.skip(f"GPT-2's vocabulary cannot be had: {error}")


def every_kind():
    return [build('bpe:400', lambda: [TEXT]), build('bytes', None), build('chars', lambda: [TEXT])]


@pytest.mark.parametrize('enc', every_kind(), ids=lambda enc: enc.name)
def test_round_trip_and_the_same_ids_in_transformers(enc):
    tokenizers = pytest.importorskip('tokenizers')
    ids = encode(enc, TEXT)
    assert ids.dtype == np.uint16 and enc.decode(ids.tolist()) == TEXT
    theirs = tokenizers.Tokenizer.from_str(to_json(enc))
    plain = TEXT.replace(EOT, '')                   # transformers takes it for the special token
    assert (theirs.encode(plain).ids == encode(enc, plain).tolist()
            and theirs.decode(encode(enc, plain)) == plain)
    again = from_json(to_json(enc))
    assert fingerprint(again) == fingerprint(enc) and eot_id(again) == eot_id(enc)
    assert encode(again, TEXT).tolist() == ids.tolist()


def test_random_text_encodes_alike_in_transformers():
    """The merges of tokenizer.json are recovered from the ranks;
    2,000 random texts find no difference."""
    tokenizers = pytest.importorskip('tokenizers')
    enc = build('bpe:700', lambda: [TEXT, 'abcabdabeabf ' * 40,
                                    'the there then them these other ' * 20])
    theirs, draw = tokenizers.Tokenizer.from_str(to_json(enc)), random.Random(0)
    for _ in range(2000):
        text = ''.join(draw.choice("abcdefhtmorsn \n'.é世") for _ in range(draw.randint(1, 40)))
        assert theirs.encode(text).ids == encode(enc, text).tolist(), text


def test_gpt2_gives_the_ids_of_gpt2():
    enc = gpt2_or_skip()
    ids = encode(enc, "Hello, I'm a language model,").tolist()
    assert ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert eot_id(enc) == 50256 and enc.n_vocab == 50257
    again = from_json(to_json(enc))
    assert (fingerprint(again) == fingerprint(enc)
            and (encode(again, TEXT) == encode(enc, TEXT)).all())
    assert again.name == 'gpt2'                         # as it is called in words


def test_training_is_repeatable_and_vocabulary_has_the_size_asked_for():
    a, b = (build('bpe:300', lambda: [TEXT, 'more text']) for _ in range(2))
    assert fingerprint(a) == fingerprint(b) and a.n_vocab == 300 and eot_id(a) == 299
    assert fingerprint(a) != fingerprint(build('bpe:301', lambda: [TEXT, 'more text']))


def test_end_of_text_in_a_text_is_text():
    enc = build('bytes', None)
    assert eot_id(enc) not in encode(enc, f'a{EOT}b')


def test_chars_are_the_sorted_characters_and_have_no_end_of_text():
    enc = build('chars', lambda: ['cab', 'é\n'])
    assert encode(enc, '\nabcé').tolist() == [0, 1, 2, 3, 4] and eot_id(enc) is None


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
    tiktoken = pytest.importorskip('tiktoken')
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setattr('tiktoken.load.read_file',
                        lambda *_: (_ for _ in ()).throw(ConnectionError('no network')))
    words = 'vocab.bpe as 6d1cbeee.*TIKTOKEN_CACHE_DIR.*bpe:4096 needs no network'
    with pytest.raises(ValueError, match=words):
        tokenizer.gpt2()


def test_a_foreign_tokenizer_is_refused():
    with pytest.raises(ValueError, match='Unigram'):
        from_json('{"model": {"type": "Unigram", "vocab": []}, '
                  '"added_tokens": [], "pre_tokenizer": null}')


@pytest.mark.parametrize('change', [
    {'normalizer': {'type': 'Lowercase'}},
    {'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True}},
    {'pre_tokenizer': {'type': 'ByteLevel', 'use_regex': False}},
    {'model': {'type': 'WordLevel', 'vocab': {'word': 0}}}])
def test_a_tokenizer_that_encodes_otherwise_is_refused(tmp_path, change):
    data = json.loads(tokenizer.to_json(tokenizer.byte_pairs('bytes', [])))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match='cannot be used as a tokenizer'):
        tokenizer.load(tmp_path / 'tokenizer.json')


def test_special_tokens_may_stand_anywhere():
    """Others train a tokenizer with these at its beginning, and add some at its end."""
    tokenizers = pytest.importorskip('tokenizers')
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = ' electroencephalogram' * 9      # each merge needs the one before
    theirs.train_from_iterator([plain], tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[EOT, '<unk>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    theirs.add_special_tokens(['<pad>'])
    enc = from_json(theirs.to_str())
    again = from_json(to_json(enc))
    assert fingerprint(again) == fingerprint(enc) and eot_id(again) == 0
    assert encode(again, plain).tolist() == theirs.encode(plain).ids
    some = ['a<unk>b', 'c']
    assert tokenizer.encode_documents(enc, some).tolist() == [
        0, *enc.encode_ordinary(some[0]), 0, *enc.encode_ordinary(some[1])]
    widths = [len(token) for token in tokenizer.token_bytes(enc)]
    assert widths[:2] == [0, 0] and widths[-1] == 0 and min(widths[2:-1]) == 1


def test_ids_that_do_not_fit_16_bits_are_refused():
    """They would be stored as others; some GPT-2s of many languages have 100,000 tokens."""
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
def test_pieces_and_documents_at_once_give_what_one_at_a_time_gives(name, request, monkeypatch):
    """Against tiktoken's own encode_ordinary, text by text and whole."""
    if name == 'gpt2':
        request.getfixturevalue('gpt2')
    enc, rng = tokenizer.build(name, lambda: ['the ab 12 ab the ab ' * 9]), random.Random(3)
    texts = [''.join(rng.choices(PARTS, k=rng.randrange(60))) for _ in range(300)]
    expected = [enc.encode_ordinary(text) for text in texts]
    for piece in (1, 3, 10, 2 ** 18):
        monkeypatch.setattr(tokenizer, 'PIECE', piece)
        assert [tokenizer.encode(enc, text).tolist() for text in texts] == expected
        for some in ([], texts, [text for text in texts if '<|e' not in text]):
            ids = tokenizer.encode_documents(enc, some).tolist()
            assert ids == [id for text in some
                           for id in [tokenizer.eot_id(enc), *enc.encode_ordinary(text)]]


def test_white_space_without_end_is_encoded():
    """tiktoken 0.14 alone gives up on this ('Max stack size exceeded for backtracking')."""
    enc, text = tokenizer.build('bytes', list), 'a' + ' ' * 1_500_000 + 'b\t' + '\n' * 1_500_000
    assert enc.decode(tokenizer.encode(enc, text).tolist()) == text
