"""
Tokenizers of other programs give the ids and texts of transformers on the same files.

The end-of-text token is text in a text; elsewhere than there nothing differs.
"""

import json
import re

import numpy as np
import pytest
import tokenizers
import torch
from conftest import script

from gpt import checkpoints, tokenizer
from gpt.hf_tokenizer import HFTokenizer
from gpt.tokenizer import EOT, BytePairs, encode, fingerprint, from_json, load, to_json
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')

TEXTS = ['Hello <|user|> hi  thou art mine, my lord.', ' a b<s> <mask>x', 'é世界😀\x00 ~ z', '',
         '[PAD] a', "thou art<|bot|> café\n\n  don't", 'a <|user|>  b']
CORPUS = ['the king and the lord said hello to my lord, thou art mine. ' * 9, *TEXTS]


def added(i, content, **flags):
    return dict(id=i, content=content, single_word=False, lstrip=False, rstrip=False,
                normalized=False, special=False) | flags


OURS = json.loads(to_json(tokenizer.train_byte_pairs(CORPUS, 300)))
SIZE = len(OURS['model']['vocab'])
PAIR = {'vocab.json': OURS['model']['vocab'], 'merges.txt': '\n'.join(
    ['#version: 0.2', *(' '.join(pair) for pair in OURS['model']['merges']), ''])}
GPT2_CLASS = {'tokenizer_class': 'GPT2Tokenizer'}
USER = added(SIZE, '<|user|>', special=True)
FLAGS = {key: value for key, value in USER.items() if key != 'id'}


def with_model(**changes):
    return {**OURS, 'model': {**OURS['model'], **changes}}


def trained(model, trainer, **parts):
    """The tokenizer.json of the library's own trainer."""
    made = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator(CORPUS, trainer)
    return json.loads(made.to_str())


def trainer(kind, *special, **settings):
    return getattr(tokenizers.trainers, f'{kind}Trainer')(
        special_tokens=[*special], show_progress=False, **settings)


def byte_level(*special):
    return trained(tokenizers.models.BPE(), trainer('Bpe', *special, vocab_size=320),
                   pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
                   decoder=tokenizers.decoders.ByteLevel())


def saved(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in {'config.json': {'model_type': 'gpt2'}, **files}.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding='utf-8')
    return folder


SHIFTED = {token: i + 3 for token, i in OURS['model']['vocab'].items()}
CHARS = json.loads(to_json(tokenizer.Characters(sorted(set(''.join(CORPUS))))))
PRE, DECODE = tokenizers.pre_tokenizers, tokenizers.decoders
FOLDERS = {
    # added tokens
    'added tokens': {'tokenizer.json': {**OURS, 'added_tokens': [
        *OURS['added_tokens'], USER, added(SIZE + 1, 'thou art', normalized=True)]}},
    'spaces around them': {'tokenizer.json': {**OURS, 'added_tokens': [
        *OURS['added_tokens'], {**USER, 'lstrip': True, 'rstrip': True}]}},
    'whole words': {'tokenizer.json': {**OURS, 'added_tokens': [
        *OURS['added_tokens'], added(SIZE, 'art', single_word=True), added(SIZE + 1, 'lord,')]}},
    'lower case and added': {'tokenizer.json': {
        **OURS, 'normalizer': {'type': 'Lowercase'}, 'added_tokens': [
            *OURS['added_tokens'], added(SIZE, 'Thou Art', normalized=True)]}},
    'named in tokenizer_config': {'tokenizer.json': OURS, 'tokenizer_config.json': {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'pad_token': '[PAD]'}},
    # vocab.json with merges.txt
    'pair': PAIR,
    'pair, added_tokens.json': {
        **PAIR, 'added_tokens.json': {'<|user|>': SIZE, '<|bot|>': SIZE + 1},
        'tokenizer_config.json': GPT2_CLASS, 'special_tokens_map.json': {
            'eos_token': EOT, 'additional_special_tokens': ['<|user|>']}},
    'pair, special_tokens_map.json': {**PAIR, 'special_tokens_map.json': {
        'eos_token': {**FLAGS, 'content': '</s>', 'lstrip': True}, 'pad_token': '[PAD]'}},
    'pair, added_tokens_decoder': {**PAIR, 'tokenizer_config.json': {
        **GPT2_CLASS, 'added_tokens_decoder': {str(SIZE): {**FLAGS, 'lstrip': True}}}},
    'pair, prefix space': {**PAIR, 'tokenizer_config.json': {
        **GPT2_CLASS, 'add_prefix_space': True}},
    'pair, special names as tokens': {**PAIR, 'vocab.json': {
        **{name: i for i, name in enumerate(['<s>', '</s>', '<mask>'])}, **{
            token: i for token, i in SHIFTED.items() if token != EOT}}},
    # other settings of byte-level BPE
    'prefix space': {'tokenizer.json': {**OURS, 'pre_tokenizer': {
        **OURS['pre_tokenizer'], 'add_prefix_space': True}}},
    'prefix space by tokenizer_config': {'tokenizer.json': OURS, 'tokenizer_config.json': {
        **GPT2_CLASS, 'add_prefix_space': True}},
    'no splitting': {'tokenizer.json': {**OURS, 'pre_tokenizer': {
        **OURS['pre_tokenizer'], 'use_regex': False}}},
    'lower case': {'tokenizer.json': {**OURS, 'normalizer': {'type': 'Lowercase'}}},
    'truncation and padding': {'tokenizer.json': {**OURS, 'added_tokens': [
        *OURS['added_tokens'], USER], 'truncation': {
            'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0},
        'padding': {'strategy': {'Fixed': 8}, 'direction': 'Right', 'pad_to_multiple_of': None,
                    'pad_id': 0, 'pad_type_id': 0, 'pad_token': '!'}}},
    'not all bytes': {'tokenizer.json': byte_level(EOT)},
    # ids
    'special tokens first': {'tokenizer.json': byte_level(EOT, '<unk>', '<mask>')},
    'ids from 3': {'tokenizer.json': {**with_model(vocab=SHIFTED), 'added_tokens': [
        added(SHIFTED[EOT], EOT, special=True)]}},
    'a gap': {'tokenizer.json': {
        **with_model(vocab={**OURS['model']['vocab'], '<|user|>': 400}),
        'added_tokens': [*OURS['added_tokens'], {**USER, 'id': 400}]}},
    'merges in another order': {'tokenizer.json': with_model(
        merges=OURS['model']['merges'][::-1])},
    'a token without a merge': {'tokenizer.json': with_model(
        vocab={**OURS['model']['vocab'], 'art': SIZE})},
    'characters from 5': {'tokenizer.json': {**CHARS, 'model': {**CHARS['model'], 'vocab': {
        char: i + 5 for char, i in CHARS['model']['vocab'].items()}}}},
    # other models
    'wordpiece': {'tokenizer.json': trained(
        tokenizers.models.WordPiece(unk_token='[UNK]'),
        trainer('WordPiece', '[UNK]', '[PAD]', '[SEP]', vocab_size=200),
        normalizer=tokenizers.normalizers.BertNormalizer(),
        pre_tokenizer=PRE.BertPreTokenizer(), decoder=DECODE.WordPiece()),
        'tokenizer_config.json': {'eos_token': '[SEP]'}},
    'unigram': {'tokenizer.json': trained(
        tokenizers.models.Unigram(), trainer('Unigram', '<unk>', '</s>', vocab_size=120,
                                             unk_token='<unk>'),
        pre_tokenizer=PRE.Metaspace(), decoder=DECODE.Metaspace())},
    'words': {'tokenizer.json': trained(
        tokenizers.models.WordLevel(unk_token='<unk>'), trainer('WordLevel', '<unk>', '</s>'),
        pre_tokenizer=PRE.Whitespace())},
}
AUTO = ('pair', 'prefix space by', 'added')     # where transformers chooses GPT-2's class


@pytest.mark.parametrize('kind', FOLDERS)
def test_ids_and_texts_are_those_of_transformers(kind, tmp_path):
    folder = saved(tmp_path / 'it', FOLDERS[kind])
    cls = (transformers.AutoTokenizer if kind.startswith(AUTO)
           else transformers.PreTrainedTokenizerFast)
    theirs, encoding = cls.from_pretrained(folder), load(tokenizer.stored(folder))
    assert isinstance(encoding, HFTokenizer) == (kind != 'pair')
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)['input_ids']
        assert encode(encoding, text).tolist() == expected
        assert encoding.decode(expected) == theirs.decode(expected)
        pieces = b''.join(map(encoding.decode_single_token_bytes, expected)).decode()
        assert pieces in (theirs.decode(expected), f' {theirs.decode(expected)}')


@pytest.mark.parametrize('kind', FOLDERS)
def test_end_of_text_in_a_text_is_text_and_begins_documents(kind, tmp_path):
    encoding = load(tokenizer.stored(saved(tmp_path / 'it', FOLDERS[kind])))
    eot, name = encoding.eot, encoding.eot_text
    if eot is None:
        assert name == ''
        return
    assert eot not in encode(encoding, f'a{name}b, {name}')
    both = tokenizer.encode_documents(encoding, ['a', f'{name}b'])
    assert both.dtype == np.uint16 and both.tolist() == [
        eot, *encode(encoding, 'a'), eot, *encode(encoding, f'{name}b')]
    assert tokenizer.prompt_ids(encoding, f'{name}a') == [eot, *encode(encoding, 'a')]
    assert tokenizer.prompt_ids(encoding, '') == [eot]
    assert encoding.decode([eot]).strip() == name and tokenizer.token_bytes(encoding)[eot] == b''


@pytest.mark.parametrize('kind', FOLDERS)
def test_the_file_is_kept_and_read_alike_again(kind, tmp_path):
    encoding = load(tokenizer.stored(saved(tmp_path / 'it', FOLDERS[kind])))
    again = from_json(to_json(encoding), tokenizer.special_names(encoding))
    assert fingerprint(again) == fingerprint(encoding) and again.eot == encoding.eot
    assert to_json(again) == to_json(encoding)


def test_an_added_token_is_decoded_as_it_is_written():
    """The library takes its letters beyond ASCII for GPT-2's characters for bytes."""
    data = {**OURS, 'added_tokens': [*OURS['added_tokens'], added(SIZE, 'café')]}
    encoding = from_json(json.dumps(data))
    assert encode(encoding, 'a café').tolist()[-1] == SIZE
    assert encoding.decode([97, SIZE]) == 'acafé'


def test_the_fingerprint_tells_what_encodes_differently():
    kinds = [FOLDERS[kind]['tokenizer.json'] for kind in ('added tokens', 'lower case',
                                                          'spaces around them')]
    prints = [fingerprint(from_json(json.dumps(one))) for one in kinds]
    assert len(set(prints)) == 3
    older = {**kinds[0], 'truncation': {'direction': 'Right', 'max_length': 3, 'stride': 0,
                                        'strategy': 'LongestFirst'}}
    older['model'] = {**older['model'], 'merges': [
        ' '.join(pair) for pair in older['model']['merges']]}
    assert fingerprint(from_json(json.dumps(older, indent=3))) == prints[0]
    made = from_json(json.dumps(kinds[0]), {'eos_token': '<|user|>'})
    assert fingerprint(made) != prints[0]


@pytest.mark.parametrize('files, expected', [
    ({}, EOT),
    ({'tokenizer_config.json': {'eos_token': '</s>'}}, '</s>'),
    ({'tokenizer_config.json': {'eos_token': {'content': '</s>'}}}, '</s>'),
    ({'special_tokens_map.json': {'eos_token': '</s>'}}, '</s>'),
    ({'config.json': {'eos_token_id': 301}}, '</s>'),
    ({'config.json': {'eos_token_id': 50256}}, EOT),        # transformers' default, stale
    ({'config.json': {'eos_token_id': 65}}, EOT),           # no special token
    ({'config.json': {'eos_token_id': None}, 'tokenizer_config.json': {'eos_token': '</s>'}},
     '</s>'),
    ({'generation_config.json': {'eos_token_id': [301, 300]}, 'config.json': {
        'eos_token_id': 300}}, '</s>')])
def test_which_token_ends_a_text(files, expected, tmp_path):
    data = {**OURS, 'added_tokens': [*OURS['added_tokens'], added(SIZE, '<|user|>'),
                                     added(SIZE + 1, '</s>', special=True)]}
    assert SIZE == 300
    encoding = load(saved(tmp_path, {'tokenizer.json': data, **files}) / 'tokenizer.json')
    assert encoding.eot_text == expected
    assert tokenizer.special_names(encoding)['eos_token'] == expected


def test_a_template_puts_its_tokens_before_a_prompt_alone():
    piece = [{'SpecialToken': {'id': '<|user|>', 'type_id': 0}},
             {'Sequence': {'id': 'A', 'type_id': 0}}, {'SpecialToken': {'id': EOT, 'type_id': 0}}]
    data = {**OURS, 'added_tokens': [*OURS['added_tokens'], USER], 'post_processor': {
        'type': 'TemplateProcessing', 'single': piece, 'pair': piece, 'special_tokens': {
            name: {'id': name, 'ids': [i], 'tokens': [name]}
            for name, i in (('<|user|>', SIZE), (EOT, SIZE - 1))}}}
    encoding = from_json(json.dumps(data))
    plain = encode(encoding, 'my lord').tolist()
    assert SIZE not in plain
    assert tokenizer.prompt_ids(encoding, 'my lord') == [SIZE, *plain]


REFUSED = {
    'two of its tokens have the same id': {'tokenizer.json': {**OURS, 'added_tokens': [
        *OURS['added_tokens'], added(65, '<|user|>')]}},
    "the token 'Ā' has the id -1": {'tokenizer.json': with_model(
        vocab={token: i - 1 for token, i in OURS['model']['vocab'].items()})},
    '70,001 tokens do not fit': {'tokenizer.json': with_model(
        vocab={**OURS['model']['vocab'], 'art': 70_000})},
    "'<gap>' has the id 400, but transformers takes it for 300": {'tokenizer.json': {
        **OURS, 'added_tokens': [*OURS['added_tokens'], added(400, '<gap>')]}},
    "'<|user|>' has the id 310, but transformers takes it for 300": {
        **PAIR, 'added_tokens.json': {'<|user|>': 310}},
    "transformers' RobertaTokenizer, expected GPT2Tokenizer": {
        **PAIR, 'tokenizer_config.json': {'tokenizer_class': 'RobertaTokenizer'}},
    'no merges.txt beside it': {'vocab.json': PAIR['vocab.json']},
    'Token `zz` out of vocabulary': {**PAIR, 'merges.txt': 'zz y\n'},
    'tokenizer_config.json: not JSON': {'tokenizer.json': OURS, 'tokenizer_config.json': '{'},
    'given a list of 0, expected an object': {
        'tokenizer.json': OURS, 'tokenizer_config.json': '[]'},
    'its dropout gives other ids': {'tokenizer.json': with_model(dropout=0.1)},
    "model.vocab: given 'x', expected an object or a list": {
        'tokenizer.json': '{"model": {"vocab": "x"}}'},
    'line 1 column 1': {'tokenizer.json': ''},
    'nested too deeply': {'tokenizer.json': '[' * 100_000},
    "tokenizers library refuses it": {'tokenizer.json': {
        **OURS, 'model': {'type': 'Markov', 'vocab': {'a': 0}}}}}


@pytest.mark.parametrize('words', REFUSED)
def test_what_cannot_be_read_as_it_is_written_is_refused(words, tmp_path):
    folder = saved(tmp_path, REFUSED[words])
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        load(tokenizer.stored(folder))
    assert str(caught.value).startswith(f'{tokenizer.stored(folder)}: cannot be used as')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('junk', [
    'null', '[]', '1', '{}', '{"model": {"vocab": {"a": 1.5}}, "added_tokens": []}',
    '{"model": {"vocab": [1, 2]}, "added_tokens": []}',
    '{"model": {"vocab": {}}, "added_tokens": []}',
    '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0}]}',
    '{"model": {"vocab": {"a": 0}, "merges": 3}, "added_tokens": []}',
    '{"model": {"vocab": {"a": 0}}, "added_tokens": [], "pre_tokenizer": "ByteLevel"}',
    '{"model": {"vocab": {"a": true}}, "added_tokens": []}'])
def test_junk_is_refused_in_one_line(junk, tmp_path):
    (tmp_path / 'tokenizer.json').write_text(junk)
    with pytest.raises(ValueError, match='cannot be used as a tokenizer'):
        load(tmp_path / 'tokenizer.json')


@pytest.mark.parametrize('part', [
    {'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': ''}},
    {'normalizer': {'type': 'Replace', 'pattern': {'String': ''}, 'content': 'x'}},
    {'pre_tokenizer': {'type': 'FixedLength', 'length': 0}},
    {'post_processor': {'type': 'TemplateProcessing', 'pair': [], 'special_tokens': {}, 'single': [
        {'Sequence': {'id': 'A', 'type_id': 0}}, {'SpecialToken': {'id': 'x', 'type_id': 0}}]}},
    {'decoder': {'type': 'Strip', 'content': ' ', 'start': 9, 'stop': 9}, 'added_tokens': [],
     'model': {'type': 'Unigram', 'unk_id': 0, 'vocab': [['', 0.0], ['a', 1]]}},
    {'model': {'type': 'BPE', 'vocab': {'a': 0, 'b': 1, 'ab': 2}, 'merges': [['a', 'b']],
               'continuing_subword_prefix': 'bbb'}, 'added_tokens': []}])
def test_a_panic_of_the_library_is_a_line_of_ours_and_no_other(part, capfd):
    """It has written lines of its own to standard error by then."""
    with pytest.raises(ValueError, match='refuses it|cannot (en|de)code'):
        encoding = from_json(json.dumps({**OURS, **part}))
        prompt = tokenizer.prompt_ids(encoding, 'a \xe9 text')
        tokenizer.token_bytes(encoding)
        encoding.decode(prompt)
    assert capfd.readouterr().err == ''


def test_text_without_tokens_is_refused_by_name():
    encoding = from_json(json.dumps(FOLDERS['characters from 5']['tokenizer.json']))
    with pytest.raises(ValueError, match='cannot encode this text'):
        encode(encoding, 'ß')


def test_lone_surrogates_are_replaced_as_by_tiktoken():
    plain, foreign = (from_json(json.dumps(data)) for data in (
        OURS, FOLDERS['added tokens']['tokenizer.json']))
    assert isinstance(plain, BytePairs)
    assert encode(foreign, 'a\ud800b').tolist() == encode(plain, 'a\ud800b').tolist()


def test_long_texts_are_cut_where_nothing_changes(monkeypatch):
    text = 'my lord  said\n\n<|user|> hello, world 12 é ' * 30
    for kind in ('added tokens', 'spaces around them', 'lower case', 'special tokens first',
                 'a gap', 'not all bytes'):
        encoding = from_json(json.dumps(FOLDERS[kind]['tokenizer.json']))
        assert encoding.can_be_cut == (kind in ('special tokens first', 'a gap', 'not all bytes'))
        expected = encoding.encode(text)
        for piece in (1, 7, 100):
            monkeypatch.setattr(tokenizer, 'PIECE', piece)
            assert encode(encoding, text).tolist() == expected


def test_what_a_tokenizer_leaves_out_is_said():
    lossy = from_json(json.dumps(FOLDERS['not all bytes']['tokenizer.json']))
    assert re.fullmatch(r'.*no token for \d+ of the 256 bytes; they are left out.*', lossy.remark)
    for kind in ('added tokens', 'lower case', 'wordpiece', 'unigram', 'characters from 5'):
        assert from_json(json.dumps(FOLDERS[kind]['tokenizer.json'])).remark == ''


# Folders of models.

def model_folder(tmp_path, files, rows):
    """A tiny model with `rows` rows beside these files of a tokenizer."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=rows, n_layer=1, n_head=2, n_embd=32))
    made = checkpoints.save(tmp_path / 'saved', 0, model, tokenizer.byte_pairs('bytes', []), {})
    folder = saved(tmp_path / 'model', {})
    config = json.loads((made / 'config.json').read_text()) | {'vocab_size': rows}
    config.update(bos_token_id=None, eos_token_id=None)
    (made / 'model.safetensors').rename(folder / 'model.safetensors')
    return saved(folder, {'config.json': config, **files})


def test_added_tokens_beyond_the_rows_of_the_model_are_left_out(tmp_path, capsys):
    files = {'tokenizer.json': {**OURS, 'added_tokens': [
        *OURS['added_tokens'], added(SIZE, '[PAD]', special=True)]},
        'tokenizer_config.json': {'pad_token': '[PAD]', 'eos_token': EOT}}
    folder = model_folder(tmp_path, files, SIZE)
    for _ in range(2):
        model, encoding = checkpoints.load_model(folder)
    assert capsys.readouterr().err.count('[PAD]; left out') == 1
    assert model.config.vocab_size == encoding.n_vocab == SIZE and encoding.eot == SIZE - 1
    made = tokenizer.build(str(folder), None)           # a data set for it has the same
    assert fingerprint(made) == fingerprint(encoding)
    assert encode(encoding, '[PAD]').tolist() == encode(made, '[PAD]').tolist()


def test_other_tokens_beyond_the_rows_are_refused(tmp_path):
    folder = model_folder(tmp_path, {'tokenizer.json': OURS}, SIZE - 9)
    with pytest.raises(ValueError, match='has 299 tokens, the model 291'):
        checkpoints.load_model(folder)
    with pytest.raises(ValueError, match='model/tokenizer.json: its tokenizer has 299 tokens'):
        tokenizer.build(str(folder), None)


@pytest.mark.parametrize('name', ['vocab.txt', 'spiece.model', 'tokenizer.model', 'merges.txt',
                                  'sentencepiece.bpe.model', 'tokenizer_config.json'])
def test_gpt2_is_not_assumed_beside_another_tokenizer(name, tmp_path):
    (tmp_path / name).write_text('{}')
    with pytest.raises(ValueError, match=f'no tokenizer.json.*only {name}'):
        checkpoints.load_encoding(tmp_path, 50257)


def test_names_left_out_are_said_in_a_short_line(tmp_path, capsys):
    extra = [added(SIZE + i, f'<name {i}>') for i in range(60_000)]
    (tmp_path / 'tokenizer.json').write_text(
        json.dumps({**OURS, 'added_tokens': [*OURS['added_tokens'], *extra]}))
    assert checkpoints.load_encoding(tmp_path, SIZE).n_vocab == SIZE
    said = capsys.readouterr().err
    assert len(said) < 1020 and f'{tmp_path}: the model has {SIZE} rows, none for <name 0>' in said
    assert said.endswith('<name 59999>; left out\n')


def test_gpt2_is_assumed_without_any_and_that_is_said(gpt2, tmp_path, capsys):
    assert checkpoints.load_encoding(tmp_path, 50257).name == 'gpt2'
    assert "GPT-2's is assumed" in capsys.readouterr().err


def test_a_data_set_a_run_and_samples_with_another_end_of_text(tmp_path):
    """prepare.py keeps which token ends a text; a checkpoint keeps the file byte for byte."""
    data = {**OURS, 'added_tokens': [*OURS['added_tokens'], added(SIZE, '</s>', special=True)]}
    folder = saved(tmp_path / 'theirs', {'tokenizer.json': json.dumps(data, indent=4),
                                         'config.json': {'eos_token_id': SIZE}})
    source = tmp_path / 'a.jsonl'
    source.write_text('\n'.join(json.dumps({'text': f'my lord {i} said </s>'}) for i in range(99)))
    where = f'--data_dir={tmp_path}/data'
    script('data/prepare.py', where, '--name=d', f'--tokenizer={folder}', source)
    again = script('data/prepare.py', where, '--name=d', f'--tokenizer={folder}', source)
    assert 'up to date' in again.stdout
    manifest = json.loads((tmp_path / 'data/d/manifest.json').read_text())
    assert manifest['tokenizer']['eot_id'] == SIZE
    assert sum(split['documents'] for split in manifest['splits'].values()) == 99
    script('train.py', where, '--dataset=d', f'--out_dir={tmp_path}/run', '--device=cpu',
           '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=2',
           '--total_batch_size=64', '--max_iters=2', '--compile=False', '--minutes=0')
    step = next((tmp_path / 'run').glob('step_*2'))
    assert (step / 'tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(step)
    assert theirs.eos_token_id == SIZE and theirs.unk_token == '</s>'
    _, encoding = checkpoints.load_model(step)
    assert encoding.eot == SIZE
    assert encode(encoding, TEXTS[0]).tolist() == theirs(TEXTS[0])['input_ids']


def test_our_tokenizer_config_is_as_gpt2s(tmp_path):
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=32))
    made = checkpoints.save(tmp_path, 0, model, tokenizer.byte_pairs('bytes', []), {})
    config = json.loads((made / 'tokenizer_config.json').read_text())
    assert config['bos_token'] == config['eos_token'] == config['unk_token'] == EOT
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    assert theirs('a é')['input_ids'] == list('a é'.encode())


def test_a_converted_model_writes_the_same_text_in_ctranslate2(tmp_path):
    """Its loader needs an unk_token."""
    ctranslate2 = pytest.importorskip('ctranslate2')
    torch.manual_seed(3)
    model = GPT(GPTConfig(block_size=32, vocab_size=257, n_layer=1, n_head=2, n_embd=32)).eval()
    made = checkpoints.save(tmp_path, 0, model, tokenizer.byte_pairs('bytes', []), {})
    ctranslate2.converters.TransformersConverter(str(made)).convert(str(tmp_path / 'converted'))
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    prompt = list(b'my lord')
    found = ctranslate2.Generator(str(tmp_path / 'converted')).generate_batch(
        [theirs.convert_ids_to_tokens(prompt)], max_length=12, sampling_topk=1)[0].sequences_ids[0]
    expected = model.generate(torch.tensor([prompt]), 12, temperature=0)[0].tolist()
    assert found == expected[:len(found)] and len(found) > len(prompt)


def test_what_transformers_would_match_otherwise_is_refused(tmp_path):
    """One file says so and the other not: no ids are right."""
    token = {**USER, 'rstrip': True}
    both = {'tokenizer.json': {**OURS, 'added_tokens': [*OURS['added_tokens'], USER]}}
    for number, (files, config, words) in enumerate((
            (both, {'added_tokens_decoder': {str(SIZE): token}}, 'another lstrip, rstrip or s'),
            (both, {'split_special_tokens': True}, 'split_special_tokens, which is not'),
            (PAIR, {**GPT2_CLASS, 'add_bos_token': True}, 'add_bos_token, which is not'))):
        folder = saved(tmp_path / str(number), {**files, 'tokenizer_config.json': config})
        with pytest.raises(ValueError, match=words):
            load(next(folder.glob('[tv]o[kc]*r.json'), folder / 'vocab.json'))


def template(name, i):
    return {'type': 'TemplateProcessing', 'single': [
        {'SpecialToken': {'id': name, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}],
        'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
        'special_tokens': {name: {'id': name, 'ids': [i], 'tokens': [name]}}}


def test_a_template_without_a_row_or_a_token(tmp_path):
    """A token that is left out leaves the template too."""
    data = {**OURS, 'added_tokens': [*OURS['added_tokens'], added(SIZE, '<bos>', special=True)]}
    folder = saved(tmp_path / 'a', {
        'tokenizer.json': {**data, 'post_processor': template('<bos>', SIZE)}})
    full = load(folder / 'tokenizer.json')
    assert tokenizer.prompt_ids(full, 'my lord')[0] == SIZE
    shorter, names = tokenizer.limited(full, SIZE)
    assert names == ['<bos>'] and max(tokenizer.prompt_ids(shorter, 'my lord')) < SIZE
    folder = saved(tmp_path / 'b', {
        'tokenizer.json': {**data, 'post_processor': template('<bos>', 9999)}})
    with pytest.raises(ValueError, match='its template has the id 9999, which no token has'):
        load(folder / 'tokenizer.json')


def test_a_byte_order_mark_and_merges_to_the_end_of_text(tmp_path):
    """As Windows writes JSON; and a vocabulary trained on text that held the token's letters."""
    model = OURS['model']
    extra = dict(zip(('</', '</s', '</s>'), range(SIZE, SIZE + 3)))
    data = {**OURS, 'model': {**model, 'vocab': {**model['vocab'], **extra}, 'merges': [
        *model['merges'], ['<', '/'], ['</', 's'], ['</s', '>']]},
        'added_tokens': [added(SIZE + 2, '</s>', special=True)]}
    folder = saved(tmp_path / 'a', {'tokenizer.json': '\ufeff' + json.dumps(data),
                                    'tokenizer_config.json': '\ufeff{"eos_token": "</s>"}'})
    found = load(folder / 'tokenizer.json')
    assert found.eot == SIZE + 2
    ids = encode(found, 'a</s>b').tolist()
    assert SIZE + 2 not in ids and found.decode(ids) == 'a</s>b'
