"""The page, the text at a place and the contamination report, against plain recounts in Python."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
from conftest import script
from test_benchmarks import question
from test_overlap import plain_ngrams, strange_text
from test_shards import plain_documents

from data import explore, prepare
from gpt import tokenizer
from gpt.data import overlap, shards
from gpt.data.encode import document_hash
from gpt.settings import configure

def explored(capsys, *args):
    """What explore.py prints with these arguments."""
    capsys.readouterr()
    explore.main(configure(explore.Config, list(map(str, args)), collect=explore.COLLECT))
    return capsys.readouterr().out


def prepared(folder, texts, name='d', **options):
    (folder / f'{name}.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    prepare.main(prepare.Config(**{
        'input': (str(folder / f'{name}.jsonl'),), 'name': name, 'data_dir': str(folder),
        'tokenizer': 'bytes', 'val_fraction': 0.01, **options}))
    return folder


def shard(path, ids):
    """Write ids as a shard without a manifest."""
    path.parent.mkdir(exist_ok=True)
    writer = shards.ShardWriter(path.parent, path.name.partition('_')[0], 10 ** 6)
    writer.write(np.array(ids, np.uint16))
    writer.close()


def test_the_page_is_a_plain_recount(stories, capsys):
    page = explored(capsys, 'tiny', f'--data_dir={stories}')
    manifest = json.loads((stories / 'tiny/manifest.json').read_text())
    data = explore.open_data('tiny', str(stories))
    lines = {re.split(r'\s{2,}', line.strip())[0]: re.split(r'\s{2,}', line.strip())[1:]
             for line in page.splitlines()}
    for split in ('train', 'val'):
        tokens, said = data.splits[split], manifest['splits'][split]
        ids = tokens.read(0, len(tokens)).tolist()
        documents = plain_documents(ids, data.eot)
        lengths = sorted(map(len, documents))
        column = ['train', 'val'].index(split)
        expected = {
            'tokens of bpe:300': f"{said['tokens']:,}", 'bytes of text': f"{said['bytes']:,}",
            'bytes a token': f"{said['bytes'] / said['tokens']:.3f}", 'shards': '1',
            'documents': f"{said['documents']:,}", 'shortest': f'{lengths[0]:,} tokens',
            'half are up to': f'{lengths[-(-len(lengths) // 2) - 1]:,} tokens',
            '90 % are up to': f'{lengths[-(-len(lengths) * 9 // 10) - 1]:,} tokens',
            'longest': f'{lengths[-1]:,} tokens',
            'mean': f'{sum(lengths) / len(lengths):,.1f} tokens'}
        assert {key: lines[key][column] for key in expected} == expected
        found, hashes = explore.survey(data, split)
        assert found.tolist() == list(map(len, documents))
        assert [int(h).to_bytes(8, 'little') for h in hashes] == [
            hashlib.blake2b(np.array(part, '<u2').tobytes(), digest_size=16).digest()[:8]
            for part in documents]
    assert 'tiny.jsonl (1 file, ' in page
    assert max(map(len, page.splitlines())) <= 100


def test_a_data_set_with_its_files_can_be_replaced(tmp_path, capsys):
    prepared(tmp_path, ['one', 'two'])
    (tmp_path / 'l.jsonl').write_text('{"text": "one two three four five six seven eight"}')
    before = set((tmp_path / 'd').iterdir())
    explored(capsys, 'd', f'--data_dir={tmp_path}')
    explored(capsys, 'd', f'--data_dir={tmp_path}', f'--contamination=lambada={tmp_path}/l.jsonl')
    assert set((tmp_path / 'd').iterdir()) - before == {tmp_path / 'd/contamination.json'}
    (tmp_path / 'd/lengths.png').write_bytes(b'of an earlier version')
    prepared(tmp_path, ['three', 'four'], replace=True)
    assert set((tmp_path / 'd').iterdir()) == before


def test_duplicates_are_counted(tmp_path, capsys, gpt2):
    """prepare.py puts equal texts in one split; shards of another origin may not."""
    page = explored(capsys, 'd', f'--data_dir={prepared(tmp_path, ["same"] * 3 + list("abcde"))}')
    again = [int(n) for n in re.findall(r'(\d) \(', re.search('exact dup.*', page)[0])]
    assert sum(again) == 2 and re.search(r'also in train +0 \(0.00%\)', page)
    folder, eot = tmp_path / 'e', 50256
    shard(folder / 'train_000000.bin', [eot, 1, 2, eot, 3, eot, 1, 2, eot, 4])
    shard(folder / 'val_000000.bin', [eot, 1, 2, eot, 5])
    page = explored(capsys, 'e', f'--data_dir={tmp_path}')
    assert re.search(r'exact duplicates +1 \(25.00%\) +0 \(0.00%\)', page)
    assert re.search(r'also in train +1 \(50.00%\)', page)


@pytest.mark.parametrize('behind', [False, True])
def test_nanogpt_s_files_without_header_are_read(tmp_path, capsys, gpt2, behind):
    """With <|endoftext|> before each document, or after it as in nanoGPT's scripts."""
    enc = gpt2
    texts = [f'Story {i}: {"once upon a time " * (i + 1)}' for i in range(7)]
    for split, part in (('train', texts), ('val', texts[:1])):
        ids = [i for text in part for i in (
            [*enc.encode(text), 50256] if behind else [50256, *enc.encode(text)])]
        (tmp_path / 'd').mkdir(exist_ok=True)
        np.array(ids, '<u2').tofile(tmp_path / f'd/{split}.bin')
    page = explored(capsys, 'd', f'--data_dir={tmp_path}')
    assert 'taken for tokens of gpt2' in page and re.search(r'documents +7 +1\n', page)
    read = page.partition('sampled from train')[2]
    sampled = re.findall(r'(\d+)  (Story \d: .*)', read)
    assert len(sampled) == 5 and all(
        any(text.startswith(line) and len(enc.encode(text)) == int(length) for text in texts)
        for length, line in ((length, line.rstrip()) for length, line in sampled))
    (tmp_path / 'd/val.bin').unlink()
    assert re.search(r'documents +7\n', explored(capsys, 'd', f'--data_dir={tmp_path}'))


def test_characters_have_no_document_boundaries(tmp_path, capsys):
    prepared(tmp_path, ['to be or not to be, that is the question ' * 20], tokenizer='chars')
    page = explored(capsys, 'd', f'--data_dir={tmp_path}')
    assert 'document boundaries are not known' in page and 'documents' not in page
    shown = explored(capsys, 'd', f'--data_dir={tmp_path}', '--decode=train_000000:3', '--count=10')
    assert shown.splitlines()[1] == 'be or not '


def test_decode_shows_exactly_the_text(tmp_path, capsys):
    """Shard after shard, cut anywhere, with a line instead of each <|endoftext|>."""
    texts = ['First.\nTwo lines.', 'Second - with "quotes".', 'Third', 'Fourth, and no more']
    prepared(tmp_path, texts, shard_tokens=20)
    data = explore.open_data('d', str(tmp_path))
    mark = f'\n──── <|endoftext|> {"─" * 81}\n'
    for tokens in data.splits.values():
        text = ''.join(mark if i == 256 else chr(i) for i in tokens.read(0, len(tokens)))
        shown = [explored(capsys, 'd', f'--data_dir={tmp_path}', f'--decode={path.stem}:0')
                 for path in tokens.paths]
        assert ''.join(part.partition('\n')[2][:-1] for part in shown) == text
    tokens = data.splits['train']
    ids, start = tokens.read(0, len(tokens)).tolist(), int(tokens.starts[1])
    for offset in (0, 3, 12):
        shown = explored(capsys, 'd', f'--data_dir={tmp_path}', '--count=3',
                         f'--decode=train_000001.bin:{offset}').splitlines()
        assert shown[0] == f'train_000001: tokens {offset} to {offset + 2} of 20'
        part = ids[start + offset:start + offset + 3]
        assert '\n'.join(shown[1:]) == ''.join(mark if i == 256 else chr(i) for i in part)


def test_a_plain_text_comes_back_from_decode(stories, capsys):
    data = explore.open_data('tiny', str(stories))
    tokens = data.splits['train']
    documents = [data.encoding.decode(part)
                 for part in plain_documents(tokens.read(0, len(tokens)).tolist(), data.eot)]
    shown = explored(capsys, 'tiny', f'--data_dir={stories}', '--decode=train_000000:0',
                     '--count=1000000')
    assert re.split(r'\n── *[─ ]+<\|endoftext\|> ─+\n', shown.partition('\n')[2])[1:] == [
        *documents[:-1], documents[-1] + '\n']
    second = 1 + len(tokenizer.encode(data.encoding, documents[0]))
    shown = explored(capsys, 'tiny', f'--data_dir={stories}', f'--decode=train_000000:{second + 1}')
    assert shown.splitlines()[1].startswith(documents[1][:40])


@pytest.mark.parametrize('args, words', [
    ((), 'given none, expected one data set'), (('a', 'b'), 'given a b, expected one'),
    (('tiny', '--decode=train_000000'), 'expected SHARD:OFFSET'),
    (('tiny', '--decode=train_000009:0'), 'expected SHARD:OFFSET, a shard of train_000000, val'),
    (('tiny', '--decode=val_000000:999999'), 'expected SHARD:OFFSET, an offset below'),
    (('tiny', '--decode=val_000000:-1'), 'expected SHARD:OFFSET'),
    (('tiny', '--count=0'), 'count: given 0'),
    (('tiny', '--out=a.json'), "out: given 'a.json', expected with --contamination"),
    (('tiny', '--contamination=squad'), 'expected some of hellaswag, cbt, lambada, wikitext2'),
    (('tiny', '--contamination=cbt=/nowhere'), '/nowhere: cannot read'),
    (('nothing_here',), "the data set 'nothing_here' is not prepared")])
def test_refusals(stories, capsys, args, words):
    with pytest.raises(ValueError, match=words):
        explored(capsys, *args, f'--data_dir={stories}')


def test_a_test_set_is_given_once(stories, tmp_path, capsys):
    (tmp_path / 'l.jsonl').write_text('{"text": "one two"}')
    with pytest.raises(ValueError, match='expected each set once'):
        explored(capsys, 'tiny', f'--data_dir={stories}',
                 f'--contamination=lambada={tmp_path}/l.jsonl,lambada={tmp_path}/l.jsonl')


def test_it_imports_no_torch():
    code = 'import sys; from data import explore; print("torch" in sys.modules)'
    assert script('-c', code).stdout == 'False\n'


# Contamination, against sets of tuples of words.

@pytest.mark.parametrize('kind', ['bytes', 'gpt2'])
@pytest.mark.parametrize('chunk', [5, pytest.param(64, marks=pytest.mark.slow),
                                   pytest.param(2 ** 17, marks=pytest.mark.slow)])
def test_counts_are_those_of_sets_of_tuples(tmp_path, monkeypatch, request, kind, chunk):
    """With pieces of any size; n-grams across the end of a document are never found."""
    if kind == 'gpt2':
        request.getfixturevalue('gpt2')
    rng = random.Random(chunk)
    texts = [text for text in (strange_text(rng, 60) for _ in range(40)) if text.strip()]
    items = [strange_text(rng, 40) for _ in range(20)] + [texts[0] + texts[1], texts[2], '', '!']
    data = explore.open_data('d', str(prepared(tmp_path, texts, tokenizer=kind)))
    chunks = shards.Tokens.chunks
    train = [data.encoding.decode(part)
             for part in plain_documents(data.splits['train'].read(
                 0, len(data.splits['train'])).tolist(), data.eot)]
    monkeypatch.setattr(shards.Tokens, 'chunks', lambda self, size: chunks(self, chunk))
    grams = {n: overlap.ngrams_of(items, n) for n in (2, 3, 5)}
    known = {n: np.unique(hashes) for n, (hashes, _) in grams.items()}
    found = overlap.look_up(explore.pieces(data, explore.progress_bar([], '')), known)
    for n, (hashes, of) in grams.items():
        there = {gram for text in train for gram in plain_ngrams(text, n)}
        plain = [(gram, i) for i, text in enumerate(items) for gram in plain_ngrams(text, n)]
        assert of.tolist() == [i for _, i in plain]
        assert len(known[n]) == len({gram for gram, _ in plain})
        hits = found[n][np.searchsorted(known[n], hashes)]
        assert hits.tolist() == [gram in there for gram, _ in plain] and 0 < hits.sum() < len(hits)


def words(rng, count):
    return [''.join(rng.choices('abcdefghij', k=9)) for _ in range(count)]


def contamination(folder, capsys, *sets, name='d'):
    printed = explored(capsys, name, f'--data_dir={folder}', f"--contamination={','.join(sets)}")
    return printed, json.loads((folder / name / 'contamination.json').read_text())['sets']


def test_planted_overlaps_are_counted_exactly(tmp_path, capsys):
    """Of 40 words the first 20 are copied: 13 of 33 8-grams, 8 of 28 13-grams."""
    rng = random.Random(3)
    copied, own = words(rng, 20), words(rng, 20)
    (tmp_path / 'l.jsonl').write_text('\n'.join(json.dumps({'text': ' '.join(text)}) for text in (
        [*copied, *own], words(rng, 40), words(rng, 10), words(rng, 7))))
    texts = [f"{' '.join(words(rng, 30))} {'; '.join(copied).upper()}! {' '.join(words(rng, 30))}",
             *(' '.join(words(rng, 30)) for _ in range(20))]
    threshold = [document_hash(text.encode(), 1337) for text in texts]
    assert threshold[0] > min(threshold)                            # so the first is in train
    prepared(tmp_path, texts, val_fraction=min(threshold) * 1.0001)
    printed, sets = contamination(tmp_path, capsys, f'lambada={tmp_path}/l.jsonl')
    got = sets['lambada']
    assert got['items'] == 4 and got['ngrams'] == {
        '8': {'items': 3, 'distinct': 33 + 33 + 3, 'found': 13, 'touched': 1, 'half': 0},
        '13': {'items': 2, 'distinct': 28 + 28, 'found': 8, 'touched': 1, 'half': 0}}
    assert got['sha256'] == hashlib.sha256((tmp_path / 'l.jsonl').read_bytes()).hexdigest()
    assert not got['official']
    assert re.search(rf'lambada +4 +8 +3 +69 +{13 / 69:.3%} +{1 / 3:.2%} +0.00%', printed)


def test_every_set_is_read_with_its_right_answer(tmp_path, capsys):
    """All of a text is found in itself, nothing of it in another text."""
    rng = random.Random(4)
    ctx, right, wrong = (' '.join(words(rng, 10)) for _ in range(3))
    (tmp_path / 'h.jsonl').write_text(json.dumps(
        {'ctx': ctx, 'label': 1, 'endings': [wrong, right, wrong, wrong]}))
    (tmp_path / 'cbt').mkdir()
    asked = question(query="-LRB- Then -RRB- they did n't like the XXXXX of the old king .",
                     answer='dog')
    (tmp_path / 'cbt/cbtest_CN_valid_2000ex.txt').write_text(asked)
    (tmp_path / 'cbt/cbtest_NE_valid_2000ex.txt').write_text(question(7))
    (tmp_path / 'w.txt').write_text(' = One = \n ' + ' '.join(words(rng, 30)) + ' \n = Two = \n '
                                    + ' '.join(words(rng, 30)) + ' \n')
    there = [f'{ctx} {right}', ' '.join(f'sentence {i} of 0.' for i in range(1, 21))
             + " (Then) they didn't like the dog of the old king.",
             ' '.join(f'Sentence {i} of 7.' for i in range(1, 21)) + ' The dog 7 ran.',
             (tmp_path / 'w.txt').read_text()]
    sets = [f'hellaswag={tmp_path}/h.jsonl', f'cbt={tmp_path}/cbt', f'wikitext2={tmp_path}/w.txt']
    other = [' '.join(words(rng, 99)) for _ in 'abc']
    for name, texts, share in (('d', there, 1), ('e', other, 0)):
        fillers = [' '.join(words(rng, 5)) for _ in range(300)]     # one of them is to validate
        texts += [min(fillers, key=lambda text: document_hash(text.encode(), 1337))]
        prepared(tmp_path, texts, name=name, val_fraction=1e-6)
        got = contamination(tmp_path, capsys, *sets, name=name)[1]
        assert {key: [part['items'] for part in facts['ngrams'].values()]
                for key, facts in got.items()} == {
                    'hellaswag': [1, 1], 'cbt': [2, 2], 'wikitext2': [2, 2]}
        for facts in got.values():
            for part in facts['ngrams'].values():
                assert part['found'] == share * part['distinct'] > 0 or not share
                assert part['touched'] == part['half'] == share * part['items']
    only = contamination(tmp_path, capsys, f'cbt={tmp_path}/cbt/cbtest_NE_valid_2000ex.txt')[1]
    assert only['cbt']['items'] == 1


def test_all_of_a_real_text_is_found_in_itself(real, tmp_path, capsys):
    path = real('wikitext/wiki.valid.tokens')
    prepared(tmp_path, [path.read_text(), 'x'], tokenizer='gpt2', val_fraction=1e-9)
    data = explore.open_data('d', str(tmp_path))
    if len(data.splits['train']) < 10:                              # the text is in val
        data.splits['train'] = data.splits['val']
    items = [path.read_text()]
    grams = overlap.ngrams_of(items, 8)[0]
    known = {8: np.unique(grams)}
    assert overlap.look_up(explore.pieces(data, explore.progress_bar([], '')), known)[8].all()
    assert len(known[8]) == len(set(plain_ngrams(items[0], 8)))


def test_empty_documents_and_a_short_text_are_explored(tmp_path, capsys):
    """Twice <|endoftext|> in a row, and a text shorter than a line of the page."""
    (tmp_path / 'a.txt').write_text('hello there')
    prepare.main(prepare.Config(input=(str(tmp_path / 'a.txt'),), tokenizer='bytes', name='d',
                                data_dir=str(tmp_path)))
    for split in ('train', 'val'):
        writer = shards.ShardWriter(tmp_path / 'd', split, 99)
        writer.write(np.array([256, 256, 65, 256, 256], np.uint16))
        writer.close()
    manifest = json.loads((tmp_path / 'd/manifest.json').read_text())
    for split in ('train', 'val'):
        manifest['splits'][split]['shards'][0]['tokens'] = 5
    (tmp_path / 'd/manifest.json').write_text(json.dumps(manifest))
    capsys.readouterr()
    explore.main(configure(explore.Config, ['d', f'--data_dir={tmp_path}'], None, 'name'))
    words = capsys.readouterr().out
    assert re.search(r'documents +4 +4\n', words)
    prepare.main(prepare.Config(input=(str(tmp_path / 'a.txt'),), tokenizer='chars', name='c',
                                data_dir=str(tmp_path), val_fraction=0.3))
    explore.main(configure(explore.Config, ['c', f'--data_dir={tmp_path}'], None, 'name'))
    assert 'hello therehello' not in capsys.readouterr().out
