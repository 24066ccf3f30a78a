"""Children's Book Test: the detokenizer by hand, models of which the answers are known, the script.
"""

import json
import random
import re

import pytest
import torch
from conftest import command, script
from test_benchmarks import question

from gpt import checkpoints
import eval_cbt
from gpt import scoring
from gpt import tokenizer
from gpt.data import benchmarks
from model import GPT, GPTConfig

BYTES = tokenizer.byte_pairs('bytes', [])


def detokenize(text):
    return ''.join(eval_cbt.join_tokens(text.split()).pieces)


@pytest.mark.parametrize('tokens, text', [
    ('He came , saw , and won .', 'He came, saw, and won.'),
    ("I do n't know .", "I don't know."),
    ("It 's the king 's .", "It's the king's."),
    ("We 'll see if they 've gone , I 'm sure you 'd say .",
     "We'll see if they've gone, I'm sure you'd say."),
    ("You 're late !", "You're late!"),
    ('Is it ? No ; it is : so .', 'Is it? No; it is: so.'),
    ("`` Oh ! '' said she .", '"Oh!" said she.'),
    ("She said `` go '' twice .", 'She said "go" twice.'),
    ("` Come , ' said he .", "'Come,' said he."),
    ("` Come , ' said he , ` and see . '", "'Come,' said he, 'and see.'"),
    ("He said : ' I will . '", "He said: 'I will.'"),
    ("the duchesses ' daughters", "the duchesses' daughters"),
    ("` The duchesses ' daughters , ' said he .", "'The duchesses' daughters,' said he."),
    ("called ` Donkey Skin ' by all", "called 'Donkey Skin' by all"),
    ("`` It is ` Donkey Skin ' '' , said he .", '"It is \'Donkey Skin\'", said he.'),
    ("` What ? ' ` Nothing . '", "'What?' 'Nothing.'"),
    ("` A , ' he said . ' I will . '", "'A,' he said. 'I will.'"),
    ("so it was . ' ` Yes ! '", "so it was.' 'Yes!'"),
    ('-LRB- as they say -RRB- he went', '(as they say) he went'),
    ('-LSB- Illustration : A -RSB- The', '[Illustration: A] The'),
    ('he -LRB- she -RRB- , too', 'he (she), too'),
    ('to save it -- and ours', 'to save it--and ours'),
    ('I can not come', 'I cannot come'),
    ('Can not I ?', 'Cannot I?'),
    ("Then 't is so", "Then 'tis so"),
    ("'T is true", "'Tis true"),
    ("five o'clock", "five o'clock"),
    ('milk-white Arabs', 'milk-white Arabs'),
    ('a cat . The dog', 'a cat. The dog'),
    ('fifty % of it', 'fifty% of it'),
    ("`` Mr. Crow , '' he said", '"Mr. Crow," he said'),
    ("DO N'T", "DON'T"),
    ("He said : '' Come here . ''", 'He said: "Come here."'),
    ("`` Go , '' said Dan , '' 'cause I wo n't . '' `` Oh ! ''",
     '"Go," said Dan, "\'cause I won\'t." "Oh!"'),
    ("I tell you , '' concluded Peter . `` Go . ''", 'I tell you," concluded Peter. "Go."'),
    ("it is . '' And then she left .", 'it is." And then she left.'),
    ("else to do . '' '' ` Remember it , ' I said . ''",
     'else to do." "\'Remember it,\' I said."'),
    ('one', 'one'),
    ('', '')])
def test_tokens_become_text_as_people_write_it(tokens, text):
    assert detokenize(tokens) == text
    assert detokenize(text) == text


def test_a_quote_that_opens_before_the_candidate_closes_after_it():
    query = "He said , '' the XXXXX ran . ''"
    asked = benchmarks.Question(['He came .'] * 20, query, 'dog', ['dog'],
                                '')
    context, (ending,) = eval_cbt.render(asked, BYTES)
    assert BYTES.decode(context + ending).endswith('He said, "the dog ran."')


def test_nothing_of_the_tokens_is_left_in_the_real_books(real):
    """No space before a comma, no ``, no bracket's code; of single quotes CoreNLP itself confuses
    a few, and where a passage begins within a quotation nobody can know."""
    lines = real('cbt/raw/cbt_valid.txt').read_text().splitlines()
    texts = [detokenize(' '.join(lines[i:i + 21])) for i in range(0, len(lines), 21)]
    left = re.compile(r" [,.;:!?%)\]]| n't\b| '(s|ll|re|ve|d|m)\b|`|-[LRSC]{1,2}B-|\( |\[ | -- |"
                      r"\bcan not\b")
    assert [text[m.start() - 20:m.end() + 20] for text in texts for m in left.finditer(text)] == []
    quotes = sum(len(re.findall(r"(?<![\w,.;:!?\"'-])''", text)) for text in texts)
    assert quotes <= 20


def questions(n=12):
    """Whose answer is the candidate that stands most often in the text."""
    found = []
    for k in range(n):
        text = question(k, answer='hen', query=f'And XXXXX {k} ran .')
        text = text.replace('Sentence 7 of', 'hen 7 hen').replace('Sentence 9 of', 'fox 9 hen')
        found.append(benchmarks.question([('x', line) for line in text.strip().split('\n')]))
    return found


@pytest.mark.parametrize('text', ['detok', 'raw'])
@pytest.mark.parametrize('preset', eval_cbt.PRESETS)
def test_context_and_endings_are_the_ten_texts(text, preset):
    *_, gap, eot = eval_cbt.PRESETS[preset]
    for q in questions(3):
        context, endings = eval_cbt.render(q, BYTES, text, gap, eot)
        mark = '<|endoftext|>' if eot else ''
        for candidate, ending in zip(q.candidates, endings):
            whole = ' '.join(q.sentences) + gap + q.query.replace('XXXXX', candidate)
            whole = detokenize(whole) if text == 'detok' else whole
            assert BYTES.decode([*context, *ending]) == mark + whole + mark
        assert len({tuple(ending[:1]) for ending in endings}) > 1       # cut where they part


@pytest.mark.parametrize('subset', ['CN', 'NE'])
def test_parts_encoded_alone_are_the_whole_encoded(real, gpt2, subset):
    """Over rebuilt questions, with GPT-2's tokens: what the definition asks for."""
    encoding = gpt2
    file = real(f'cbt/rebuilt/cbtest_{subset}_valid_2000ex.rebuilt.txt')
    for q in random.Random(0).sample(benchmarks.cbt(subset, 'valid', file)[0], 60):
        for text in ('detok', 'raw'):
            context, endings = eval_cbt.render(q, encoding, text)
            for candidate, ending in zip(q.candidates, endings):
                whole = ' '.join([*q.sentences, q.query.replace('XXXXX', candidate)])
                whole = detokenize(whole) if text == 'detok' else whole
                assert tokenizer.encode(encoding, whole).tolist() == context + ending


def choices(model, qs, **how):
    items = [eval_cbt.render(q, BYTES) for q in qs]
    scores = scoring.ending_loglikelihoods(model, items, **how)
    return [eval_cbt.grade(q, ten)[0] for q, ten in zip(qs, scores)], scores


def copying(ids, positions=None, mask=None):
    """The logit of a byte is how often it has been seen."""
    logits = torch.zeros(*ids.shape, BYTES.n_vocab)
    for b, t in ((b, t) for b in range(len(ids)) for t in range(ids.size(1))):
        seen = ids[b, :t + 1] if mask is None else ids[b][mask[b, 0, t]]
        logits[b, t] = torch.bincount(seen, minlength=BYTES.n_vocab)
    return logits


@pytest.mark.parametrize('share', [True, False])
def test_a_copying_model_finds_the_most_frequent_candidate(share):
    """It can do so from the twenty sentences alone: without a context it takes the first."""
    letters, draw, qs = 'ABCDEFGHIJ', random.Random(0), []
    for k in range(4):
        story = [f'so {letter} ran .' for letter in letters + letters[k] + 'ABCDEFGHI']
        draw.shuffle(story)
        story[3] += f' and {letters[k]} too , {letters[k]} .'
        qs.append(benchmarks.Question(story, 'Then XXXXX went .', letters[k], list(letters), ''))
    right, scores = choices(copying, qs, share=share)
    assert right == [True] * 4
    assert all(eval_cbt.grade(q, ten)[1] for q, ten in zip(qs, scores))     # the baseline too
    blind = [q._replace(sentences=['x .'] * 20) for q in qs]
    right, scores = choices(copying, blind, share=share)
    assert right == [True, False, False, False]


def test_a_constant_scorer_takes_the_candidate_of_fewest_tokens():
    qs = [q._replace(candidates=['abcd', 'abc', 'hen', 'xy', 'ab', 'e' * 5, 'f' * 6, 'g' * 7,
                                 'h' * 8, 'i' * 9], answer=answer)
          for q, answer in zip(questions(2), ('xy', 'ab'))]
    right, _ = choices(lambda ids, **places: torch.zeros(*ids.shape, BYTES.n_vocab), qs)
    assert right == [True, False]                       # ties: the first wins


def test_permuting_candidates_permutes_the_scores():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=BYTES.n_vocab)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    qs = questions(2)
    turned = [q._replace(candidates=q.candidates[::-1]) for q in qs]
    for ten, other in zip(choices(model, qs)[1], choices(model, turned)[1]):
        assert [s.sum for s in ten] == pytest.approx([s.sum for s in other][::-1], rel=1e-5)


@pytest.fixture
def folder(tmp_path):
    """Two subsets of questions, and a model."""
    for name in ('CN', 'NE'):
        (tmp_path / f'cbtest_{name}_valid_2000ex.txt').write_text(
            ''.join(question(k) for k in range(6)))
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=BYTES.n_vocab))
    checkpoints.save(tmp_path / 'model', 0, model, BYTES, {})
    return tmp_path


def test_the_script_from_end_to_end(folder, capsys):
    done = script('eval_cbt.py', '-m', folder / 'model', f'--data={folder}', '-d', 'cpu',
                  f'--out={folder}/a.json')
    for words in ('protocol paper, valid, detok', 'common nouns', 'named entities', '/6 ',
                  'that the text has most often', 'compare with nothing published', 'chance: 10 %'):
        assert words in done.stdout, done.stdout
    assert 'GPT-2 paper' not in done.stdout
    found = json.loads((folder / 'a.json').read_text())
    assert found['name'] == 'cbt-paper-valid-detok-CN-NE' and len(found['data']['sha256']) == 129
    command(eval_cbt, '-m', folder / 'model', f'--data={folder}', '--share=False',
            f'--out={folder}/b.json')
    capsys.readouterr()
    command(eval_cbt, f'--compare={folder}/a.json,{folder}/b.json')
    assert capsys.readouterr().out.count('within noise') == 2
    (folder / 'cbtest_CN_valid_2000ex.txt').write_text(question(0, answer='yak') + question(1))
    with pytest.raises(ValueError, match="the answer 'yak' is not one of"):
        command(eval_cbt, '-m', folder / 'model', f'--data={folder}', '--subset=CN')


@pytest.mark.parametrize('flags, words', [
    (['--preset=mine'], "preset: given 'mine', expected one of paper, mindspore, seed"),
    (['--subset=CN,XX'], "subset: given 'XX', expected one of CN, NE, V, P"),
    (['--split=train'], "split: given 'train', expected one of valid, test"),
    (['--text=html'], "text: given 'html', expected one of detok, raw"),
    (['--limit=-1'], 'limit: given -1, expected 0 or more'),
    (['--split=test'], 'cbtest_CN_test_2500ex.txt: cannot read this file')])
def test_bad_input_is_refused(folder, flags, words):
    with pytest.raises(ValueError, match=words):
        command(eval_cbt, f'--data={folder}', '-m', folder / 'model', *flags)


def test_a_file_is_one_subset(folder, capsys):
    file = folder / 'cbtest_NE_valid_2000ex.txt'
    with pytest.raises(ValueError, match='a file, which holds one subset; --subset says which'):
        command(eval_cbt, f'--data={file}', '-m', folder / 'model')
    command(eval_cbt, f'--data={file}', '-m', folder / 'model', '--subset=NE',
            f'--out={folder}/ne.json')
    assert 'common nouns' not in capsys.readouterr().out


def test_published_numbers_are_printed_for_official_weights_and_data(folder, monkeypatch, capsys):
    """As if this model and these questions were the official ones."""
    monkeypatch.setattr(checkpoints, 'official_name', lambda name: 'gpt2')
    for subset in ('CN', 'NE'):
        monkeypatch.setitem(benchmarks.CBT_BLOBS, f'cbtest_{subset}_valid_2000ex.txt', '')
    flags = ['-m', folder / 'model', f'--data={folder}', f'--out={folder}/a.json']
    for more, shown in (([], 2), (['--limit=3'], 0), (['--text=raw'], 0), (['--subset=NE'], 1)):
        command(eval_cbt, *flags, *more)
        text = capsys.readouterr().out
        assert text.count('GPT-2 paper: outside the interval') == shown, text
    assert 'published 83.4, GPT-2 paper' in text
    command(eval_cbt, *flags, '--preset=mindspore')
    assert 'published 87.85, MindSpore' in capsys.readouterr().out


def test_the_presets():
    cfg = eval_cbt.resolved(eval_cbt.Config())
    assert (cfg.split, cfg.subset, cfg.text) == ('valid', ('CN', 'NE'), 'detok')
    cfg = eval_cbt.resolved(eval_cbt.Config(preset='seed', subset=('P', 'V'), text='detok'))
    assert (cfg.split, cfg.subset, cfg.text) == ('test', ('P', 'V'), 'detok')
