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


def every_kind():
    return [build('bpe:400', lambda: [TEXT]), build('bytes', None), build('chars', lambda: [TEXT])]


@pytest.mark.parametrize('encoding', every_kind(), ids=lambda encoding: encoding.name)
def test_round_trip_and_the_same_ids_in_transformers(encoding):
    tokenizers = pytest.importorskip('tokenizers')
    ids = encode(encoding, TEXT)
    assert ids.dtype == np.uint16 and encoding.decode(ids.tolist()) == TEXT
    theirs = tokenizers.Tokenizer.from_str(to_json(encoding))
    plain = TEXT.replace(EOT, '')                   # transformers takes it for the special token
    assert (theirs.encode(plain).ids == encode(encoding, plain).tolist()
            and theirs.decode(encode(encoding, plain)) == plain)
    again = from_json(to_json(encoding))
    assert fingerprint(again) == fingerprint(encoding) and eot_id(again) == eot_id(encoding)
    assert encode(again, TEXT).tolist() == ids.tolist()


def test_random_text_encodes_alike_in_transformers():
    """The merges of tokenizer.json are recovered from the ranks;
    2,000 random texts find no difference."""
    tokenizers = pytest.importorskip('tokenizers')
    encoding = build('bpe:700', lambda: [TEXT, 'abcabdabeabf ' * 40,
                                    'the there then them these other ' * 20])
    theirs, rng = tokenizers.Tokenizer.from_str(to_json(encoding)), random.Random(0)
    for _ in range(2000):
        text = ''.join(rng.choice("abcdefhtmorsn \n'.é世") for _ in range(rng.randint(1, 40)))
        assert theirs.encode(text).ids == encode(encoding, text).tolist(), text


def test_gpt2_gives_the_ids_of_gpt2(gpt2):
    encoding = gpt2
    ids = encode(encoding, "Hello, I'm a language model,").tolist()
    assert ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert eot_id(encoding) == 50256 and encoding.n_vocab == 50257
    again = from_json(to_json(encoding))
    assert (fingerprint(again) == fingerprint(encoding)
            and (encode(again, TEXT) == encode(encoding, TEXT)).all())
    assert again.name == 'gpt2'


def test_training_is_repeatable_and_vocabulary_has_the_size_asked_for():
    a, b = (build('bpe:300', lambda: [TEXT, 'more text']) for _ in range(2))
    assert fingerprint(a) == fingerprint(b) and a.n_vocab == 300 and eot_id(a) == 299
    assert fingerprint(a) != fingerprint(build('bpe:301', lambda: [TEXT, 'more text']))


def test_end_of_text_in_a_text_is_text():
    encoding = build('bytes', None)
    assert eot_id(encoding) not in encode(encoding, f'a{EOT}b')


def test_chars_are_the_sorted_characters_and_have_no_end_of_text():
    encoding = build('chars', lambda: ['cab', 'é\n'])
    assert encode(encoding, '\nabcé').tolist() == [0, 1, 2, 3, 4] and eot_id(encoding) is None


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


def test_an_unsupported_tokenizer_is_refused():
    with pytest.raises(ValueError, match='Unigram'):
        from_json('{"model": {"type": "Unigram", "vocab": []}, '
                  '"added_tokens": [], "pre_tokenizer": null}')


@pytest.mark.parametrize('change', [
    {'normalizer': {'type': 'Lowercase'}},
    {'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True}},
    {'pre_tokenizer': {'type': 'ByteLevel', 'use_regex': False}},
    {'model': {'type': 'WordLevel', 'vocab': {'word': 0}}}])
def test_a_tokenizer_that_encodes_differently_is_refused(tmp_path, change):
    data = json.loads(tokenizer.to_json(tokenizer.byte_pairs('bytes', [])))
    (tmp_path / 'tokenizer.json').write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match='cannot be used as a tokenizer'):
        tokenizer.load(tmp_path / 'tokenizer.json')


def test_special_tokens_may_have_any_id():
    """Some tokenizers have them at the beginning and at the end."""
    tokenizers = pytest.importorskip('tokenizers')
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain = ' electroencephalogram' * 9      # each merge needs the previous one
    theirs.train_from_iterator([plain], tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[EOT, '<unk>'], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    theirs.add_special_tokens(['<pad>'])
    encoding = from_json(theirs.to_str())
    again = from_json(to_json(encoding))
    assert fingerprint(again) == fingerprint(encoding) and eot_id(again) == 0
    assert encode(again, plain).tolist() == theirs.encode(plain).ids
    some = ['a<unk>b', 'c']
    assert tokenizer.encode_documents(encoding, some).tolist() == [
        0, *encoding.encode_ordinary(some[0]), 0, *encoding.encode_ordinary(some[1])]
    widths = [len(token) for token in tokenizer.token_bytes(encoding)]
    assert widths[:2] == [0, 0] and widths[-1] == 0 and min(widths[2:-1]) == 1


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
                           for id in [tokenizer.eot_id(encoding), *encoding.encode_ordinary(text)]]


def test_very_long_white_space_is_encoded():
    """tiktoken 0.14 alone gives up on this ('Max stack size exceeded for backtracking')."""
    encoding = tokenizer.build('bytes', list)
    text = 'a' + ' ' * 1_500_000 + 'b\t' + '\n' * 1_500_000
    assert encoding.decode(tokenizer.encode(encoding, text).tolist()) == text
