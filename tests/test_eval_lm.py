"""Perplexities: models of which they are known, protocols, normalisers, detokenizers, Table 3."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, script

from gpt import checkpoints
import eval_lm
from gpt import scoring
from gpt import results
from gpt import tokenizer
from gpt.data import benchmarks
from gpt import files
from model import GPT, GPTConfig

BYTES = tokenizer.byte_pairs('bytes', [])
V = BYTES.n_vocab
HOW = {'batch_tokens': 0}


class Model:
    """A callable in the place of a GPT: the logits (B, T, V) of ids (B, T)."""

    config = SimpleNamespace(block_size=32)

    def __init__(self, logits_of):
        self.logits_of = logits_of

    def __call__(self, ids, **places):
        return self.logits_of(ids)


UNIFORM = Model(lambda ids: torch.zeros(*ids.shape, V))


def config(**changed):
    return eval_lm.Config(**{'task': 'wikitext2', **changed})


def test_a_uniform_model_has_known_perplexities():
    """ln V nats a token, over whatever units the text has: one byte is one token here."""
    text = 'Héllo, wörld. ' * 40
    cfg = eval_lm.resolved(config(file='x'))
    corpus = eval_lm.as_corpus(text, cfg)
    measures, notes, _ = eval_lm.rolling(cfg, UNIFORM, BYTES, corpus, HOW)
    n = len(text.encode())
    assert list(measures)[0] == 'token' and measures['token']['count'] == n
    assert measures['token']['value'] == pytest.approx(V, rel=1e-5)
    assert measures['byte']['value'] == pytest.approx(math.log2(V), rel=1e-5)
    assert measures['character']['value'] == pytest.approx(math.log2(V) * n / len(text), rel=1e-5)
    assert measures['word']['value'] == pytest.approx(V ** (n / 80), rel=1e-3)
    assert measures['word']['count'] == 80 and measures['character']['count'] == len(text)
    assert 'stride 32' in notes[0]


@pytest.mark.parametrize('cfg, count', [
    (config(file='x', stride=5), 5), (config(task='enwik8'), 32), (config(), 32),
    (config(protocol='harness'), 32), (config(stride=7, protocol='harness'), 7)])
def test_the_stride_is_the_protocols_unless_it_is_set(cfg, count):
    cfg = eval_lm.resolved(cfg)
    corpus = eval_lm.as_corpus('= A = \n some words \n' * 20, cfg)
    _, notes, _ = eval_lm.rolling(cfg, UNIFORM, BYTES, corpus, HOW)
    assert f'windows of 32 tokens, stride {count}' in notes[0]


def test_pieces_are_of_bytes_whatever_the_tokenizer():
    """So that models of different tokenizers, and blocks, are compared on the same pieces."""
    text = 'Some words, and more of them. ' * 30
    other = tokenizer.build('bpe:300', lambda: [text])
    for encoding in (BYTES, other):
        ids = tokenizer.encode(encoding, text)
        logprobs = np.array([-len(encoding.decode_single_token_bytes(i)) for i in ids], np.float32)
        score = scoring.Score(logprobs, ids)
        nats, shares = eval_lm.in_pieces(encoding, [ids], [score])
        assert len(nats) == 20 and sum(nats) == len(text) and sum(shares) == pytest.approx(1)
        assert nats / len(text) == pytest.approx(shares)        # a nat a byte, wherever it is
        assert max(shares) < 0.08


def test_bits_spent_on_detokenizing_are_paid():
    """n lines, a bit each: the total in nats grows by n ln 2."""
    corpus = eval_lm.Corpus(['abc' * 50], {'word': 1, 'byte': 150, 'character': 150}, bits=30.0)
    paid, *_ = eval_lm.rolling(config(), UNIFORM, BYTES, corpus, HOW)
    free, *_ = eval_lm.rolling(config(), UNIFORM, BYTES, corpus._replace(bits=0.0), HOW)
    assert paid['byte']['value'] - free['byte']['value'] == pytest.approx(30 / 150, rel=1e-4)


def test_what_the_loss_is_divided_by():
    """Words and lines of the file as it was, before any detokenizing."""
    text = ' \n = A = \n \n one , two @-@ three . \n'
    paper = eval_lm.as_corpus(text, config())
    assert paper.units == {'word': 3 + 6 + 4, 'byte': len(text), 'character': len(text)}
    assert paper.documents == ['\n= A =\n\none, two-three.'] and paper.bits == 2
    raw = eval_lm.as_corpus(text, config(detok=False))
    assert raw.documents == [text] and raw.units == paper.units and raw.bits == 0
    assert eval_lm.as_corpus(text, config(task='wikitext103')) == raw
    assert eval_lm.as_corpus(text, config(task='wikitext103', detok=True)) == paper
    harness = eval_lm.as_corpus(text, config(protocol='harness'))
    page = ' = A = \n \n one , two @-@ three . \n'
    assert harness.units['word'] == 9 + 2 and harness.units['byte'] == len(page)    # two empty ends
    assert harness.documents == [' = A =\n\none, two-three.\n']
    assert eval_lm.as_corpus(text, config(protocol='hf')).documents == [
        '\n\n = A = \n\n\n\n\n one , two @-@ three . \n']
    lines = eval_lm.as_corpus('one two .\nthree .\n', config(task='1bw'))
    assert lines.documents == ['one two .\n', 'three .\n'] and lines.units['word'] == 7


def test_enwik8_is_the_last_five_million_bytes(tmp_path):
    """Where the cut falls within a character, from the next one on."""
    for before, text in (('x' * 9, 'y' * 5_000_000), ('ä' * 9, 'ä' + 'y' * 4_999_999)):
        (tmp_path / 'enwik8').write_text(before + text)
        cfg = config(task='enwik8', data=str(tmp_path / 'enwik8'))
        corpus, about, _ = eval_lm.read_data(cfg)
        assert corpus.documents == [text.lstrip('ä')] and about['first'] == 0
        assert corpus.units['byte'] in (5_000_000, 4_999_999)


@pytest.mark.parametrize('before, after', [
    ('the 2 @-@ year 1 @,@ 000 m , 3 @.@ 5 km .', 'the 2-year 1,000 m, 3.5 km.'),
    ('he said " no " , then ( 3 @-@ 1 ) left ; why ?', 'he said "no", then (3-1) left; why?'),
    ("it 's the dog 's , they don 't", "it's the dog's, they don't"),
    ('Mr. H. G. Wells met St. John .', 'Mr. H. G. Wells met St. John.'),
    ('<unk> @-@ based <unk> \'s ( <unk> )', "<unk>-based <unk>'s (<unk>)")])
def test_wikitext_is_detokenized_and_the_way_back_is_known(before, after):
    assert eval_lm.detokenize(before, eval_lm.RULES) == after
    assert eval_lm.tokenize(after, eval_lm.RULES) == before


def test_what_cannot_be_undone_is_left_and_counted():
    text = 'Super Mario Bros. 3 , and more \n one , two \n'
    corpus = eval_lm.as_corpus(text, config())
    assert corpus.documents == ['Super Mario Bros. 3 , and more\none, two']
    assert corpus.note.startswith('1 of 2 lines cannot be detokenized')


def test_nearly_all_lines_of_wikitext_can_be_undone(real):
    text = real('wikitext/wiki.valid.tokens').read_text()
    corpus = eval_lm.as_corpus(text, config())
    left = int(corpus.note.split()[0])
    assert 0 < left < 60 and text.count('\n') == 3760                  # 43 of 2,461 with words
    assert len(corpus.documents[0]) < 0.97 * len(text)


@pytest.mark.parametrize('before, after', [
    ("it was n't black monday", "it wasn't black monday"),
    ("the company 's sales fell N % to $ N million", "the company's sales fell N% to $N million"),
    ("<unk> 's they 're", "<unk>'s they're")])
def test_ptb_is_detokenized_and_the_way_back_is_known(before, after):
    assert eval_lm.detokenize(before, eval_lm.PTB_RULES) == after
    assert eval_lm.tokenize(after, eval_lm.PTB_RULES) == before


# LAMBADA.

PASSAGE = 'He opened the “big” door and saw the\ndog'


def test_the_last_word_by_protocol():
    def parts(protocol, text=PASSAGE):
        context, word = eval_lm.last_word(text, BYTES, protocol)
        return BYTES.decode(context), BYTES.decode(word)

    assert parts('paper') == ('\nHe opened the "big" door and saw the', '\ndog')
    assert parts('harness') == ('He opened the “big” door and saw', ' the\ndog')
    assert parts('last-token') == (PASSAGE[:-1], 'g')
    assert parts('harness', 'one  two') == ('one', '  two')     # as the harness moves spaces


def answering(text):
    """A model that says `text` after 'the' whatever came before, with some liking for the rest."""
    ids = BYTES.encode(text)

    def logits_of(ids_seen):
        logits = torch.zeros(*ids_seen.shape, V)
        for b, t in ((b, t) for b in range(len(ids_seen)) for t in range(ids_seen.size(1))):
            seen = BYTES.decode(ids_seen[b, :t + 1].tolist()).rpartition('the')[2]
            if text.startswith(seen) and len(seen) < len(text):
                logits[b, t, ids[len(seen)]] = 5.0
        return logits

    model = Model(logits_of)
    model.config = SimpleNamespace(block_size=256)
    return model


@pytest.mark.parametrize('protocol, says, right', [
    ('harness', ' dog.', True), ('harness', ' dogs', True), ('harness', ' dot', False),
    ('paper', ' dog.', True), ('paper', ' dog was', True), ('paper', ' dogs', False),
    ('paper', ' dot', False), ('last-token', ' dog', True),
    ('last-token', ' dot', False)])
def test_lambada_by_a_model_that_answers(protocol, says, right):
    """The whole word has to be the most likely; in the paper's protocol it must also end there."""
    texts = ['Once he saw the dog']
    measures, *_ = eval_lm.lambada(config(task='lambada', protocol=protocol), answering(says),
                                  BYTES, texts, HOW)
    assert measures['accuracy']['correct'] == right
    assert ('perplexity' in measures) == (protocol != 'last-token')


def test_a_passage_longer_than_the_block_is_cut_and_counted():
    _, notes, _ = eval_lm.lambada(config(task='lambada', protocol='harness'), UNIFORM, BYTES,
                               ['so ' * 30 + 'end', 'short end'], HOW)
    assert notes == ['1 of 2 are longer than the block of 32 and lost their beginning']


def test_lambada_perplexity_is_of_words_not_of_tokens():
    """Uniform: V to the power of the tokens of a word, over examples."""
    texts = ['a bc', 'a bcd']
    measures, *_ = eval_lm.lambada(config(task='lambada', protocol='harness'), UNIFORM, BYTES,
                                   texts, HOW)
    assert measures['perplexity']['value'] == pytest.approx(V ** 3.5, rel=1e-4)
    assert measures['perplexity']['count'] == 2


def test_stop_words_and_punctuation_are_no_guess(gpt2):
    """With GPT-2's tokens: " the" is skipped for the next most likely, as the first token."""
    encoding = gpt2
    banned = eval_lm.never_last(encoding)
    for word, is_banned in ((' the', True), ('The', True), (' He', True), (',', True),
                            ('...', True), (' dog', False), (' Har', False), ('\n', False),
                            ('1', False)):
        assert banned[encoding.encode_single_token(word)] == is_banned, word
    for after, ends in ((' was', True), ('.', True), ('\n', True), ('s', False), ("'s", False),
                        ('<|endoftext|>', True), ("'", True)):
        assert eval_lm.ends_word(encoding, encoding.encode_single_token(after)) == ends, after
    the, dog = (encoding.encode_single_token(word) for word in (' the', ' dog'))

    def logits_of(ids):
        logits = torch.zeros(*ids.shape, encoding.n_vocab)
        logits[..., the], logits[..., dog] = 9.0, 8.0
        logits[ids == dog] = 0.0
        logits[ids == dog, encoding.encode_single_token('.')] = 1.0
        return logits

    model, texts = Model(logits_of), ['At last he saw a dog']
    right = {protocol: eval_lm.lambada(config(task='lambada', protocol=protocol), model, encoding,
                                       texts, HOW)[0]['accuracy']['correct']
             for protocol in ('paper', 'harness', 'last-token')}
    assert right == {'paper': 1, 'harness': 0, 'last-token': 0}


# The script.

@pytest.fixture(scope='module')
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    torch.manual_seed(0)
    checkpoints.save(folder, 0, GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=V,
                                              block_size=64)), BYTES, {})
    return folder


def test_a_file_from_end_to_end(model, tmp_path, capsys):
    (tmp_path / 'book.txt').write_text('Call me Ishmael. Some years ago. ' * 30)
    done = script('eval_lm.py', '-m', model, f'--file={tmp_path}/book.txt', '--stride=16',
                  f'--out={tmp_path}/a.json', '-d', 'cpu')
    for words in ('book.txt, ', 'perplexity per token, 990 of them', 'perplexity per word, 180',
                  'bits per byte, 990', 'windows of 64 tokens, stride 16', '95 %'):
        assert words in done.stdout, done.stdout
    found = json.loads((tmp_path / 'a.json').read_text())
    assert found['measures']['token']['nats'] == pytest.approx(
        found['measures']['byte']['value'] * 990 * math.log(2), rel=1e-6)
    for stride, name in ((16, 'b'), (64, 'c')):
        command(eval_lm, '-m', model, f'--file={tmp_path}/book.txt', f'--stride={stride}',
                '--batch_tokens=100', f'--out={tmp_path}/{name}.json')
    capsys.readouterr()
    command(eval_lm, f'--compare={tmp_path}/a.json,{tmp_path}/b.json')
    assert 'within noise' in capsys.readouterr().out
    with pytest.raises(ValueError, match="'text, stride16', .* 'text, stride64'"):
        command(eval_lm, f'--compare={tmp_path}/a.json,{tmp_path}/c.json')


def test_every_task_runs_on_a_file_of_its_kind(model, tmp_path, monkeypatch):
    """And Table 3 is printed from what they wrote, naming what is missing and how to get it."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    words = ' '.join(draw.choice(['alpha', 'beta', '<unk>', "'s", ',']) for _ in range(150))
    passages = '\n'.join(json.dumps({'text': f'He said {word} and so {word}'}) for word in 'abcde')
    texts = {'lambada': passages, 'wikitext2': f' = A = \n \n {words} \n', 'ptb': f' {words} \n',
             'enwik8': 'ä' * 200, 'text8': words, 'wikitext103': f' = A = \n \n {words} \n',
             '1bw': f'{words}\n{words}\n'}
    for task, text in texts.items():
        (tmp_path / task).write_text(text)
        for protocol in eval_lm.TASKS[task].protocols:
            cfg = eval_lm.Config(model=str(model), task=task, data=str(tmp_path / task),
                                 protocol=protocol, device='cpu',
                                 out=str(results.folder_of(str(model)) / f'{task}-{protocol}.json'))
            eval_lm.main(cfg)
    table = eval_lm.table(str(model))
    for line in ('LAMBADA (accuracy)', 'PTB (perplexity)', '/5', 'enwik8 (bits per byte)',
                 '1BW (perplexity)', 'CBT common nouns', 'yet: cbt-paper-valid-detok-CN-NE; ',
                 f'`make table3 MODEL={model}`'):
        assert line in table, table


def test_results_are_kept_under_out_of_the_current_folder(model, tmp_path, monkeypatch, capsys):
    """As runs are; and --model='' stands for the newest run, for the evaluation and the table."""
    monkeypatch.setattr(eval_lm.steps, 'newest_run', lambda: model)
    monkeypatch.chdir(tmp_path)
    Path('lambada').write_text('{"text": "He said so"}')
    command(eval_lm, '--data=lambada')
    path, = Path('out/results').glob('*/lambada-paper-*.json')
    assert f'written to {path}' in capsys.readouterr().out
    path.rename(path.with_name('lambada-paper.json'))
    assert 'of the last word, stop words excluded' in eval_lm.table('')


def test_the_table_of_a_model_without_results():
    """Every column of the paper, its published figures, and the command for the results."""
    table = eval_lm.table('gpt2-large')
    for words in ('10.87', '60.12', '93.45', '88', '19.93', '40.31', '0.97', '1.02', '22.05',
                  '44.575', 'ptb-paper, ', 'make table3 MODEL=gpt2-large'):
        assert words in table, words


@pytest.mark.parametrize('flags, words', [
    (['--task=lambda'], "task: given 'lambda', expected one of lambada, wikitext2"),
    (['--task=ptb', '--protocol=harness'], "protocol: given 'harness', expected one of paper"),
    (['--file=nothing.txt'], 'nothing.txt: cannot read this file'),
    (['--file={model}/empty'], 'there is no text in this file'),
    (['--file={model}/bytes'], 'bytes:1: not UTF-8 .invalid start byte at byte 0'),
    (['--limit=-1'], 'limit: given -1, expected 0 or more'),
    (['--file={model}/text', '--limit=2'], 'limit: given 2, but a text is counted by --characters'),
    (['--characters=2'], 'characters: given 2, but passages are counted by --limit'),
    (['--detok=false'], "detok: given 'false', expected 'auto', True or False"),
    (['--file={model}/bytes', '--protocol=harness'], "given 'harness', but a --file has none"),
    (['--file={model}/text', '--stride=65'], 'stride: given 65, expected 1 to 64'),
    (['--file={model}/text', '--out={model}'], 'is a folder, expected'),
    (['--table3'], 'there are no results of this model')])
def test_bad_input_is_refused(model, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (model / 'empty').write_text('\n')
    (model / 'bytes').write_bytes(b'\xff\xfe\x00')
    (model / 'text').write_text('one two three')
    with pytest.raises(ValueError, match=words):
        command(eval_lm, '-m', model, *(flag.replace('{model}', str(model)) for flag in flags))


def test_published_numbers_stand_beside_the_same_measurement_only(model, tmp_path, monkeypatch):
    """As if this model and this file were the official ones."""
    monkeypatch.setattr(checkpoints, 'official_name', lambda name: 'gpt2')
    path = tmp_path / 'wt.tokens'
    path.write_text(' = A = \n \n some words , and more of them \n' * 9)
    for official, flags, many in ((False, [], 0), (True, [], 1), (True, ['--protocol=harness'], 1),
                                  (True, ['--characters=99'], 0), (True, ['--stride=64'], 0),
                                  (True, ['--detok=False'], 0)):
        for name in ('wikitext2', 'wikitext2-raw'):
            monkeypatch.setitem(benchmarks.KNOWN, name, files.sha256(path) if official else '')
        command(eval_lm, '-m', model, '--task=wikitext2', f'--data={path}',
                f'--out={tmp_path}/a.json', *flags)
        found = json.loads((tmp_path / 'a.json').read_text())['measures']
        assert sum(len(measure['published']) for measure in found.values()) == many, flags
        assert len(found['word']['published']) == many


def test_every_task_has_a_source_and_every_line_of_the_table_its_measure():
    assert benchmarks.SOURCES.keys() >= eval_lm.TASKS.keys() - {'file'}
    for name, measure in eval_lm.LINES:
        task, _, protocol = name.partition('-')
        assert task == 'cbt' or protocol in eval_lm.TASKS[task].protocols, name
