"""HellaSwag: models of which the accuracy is known, the protocols, the script, the live curve."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import command, script

from gpt import checkpoints
import eval_lm
import hellaswag
from gpt import results
from gpt import tokenizer
import train
from gpt.data import benchmarks
from gpt import files
from gpt.hub import SIZES
from gpt.world import World
from model import GPT, GPTConfig

BYTES = tokenizer.byte_pairs('bytes', [])
ROWS = [{'ctx': f'{name} sits down. {who}', 'ctx_a': f'{name} sits down.', 'ctx_b': who,
         'activity_label': 'Sitting [header] down', 'label': k % 4, 'ind': k,
         'source_id': ('activitynet~v' if k % 3 else 'wikihow~1'), 'split_type': 'indomain',
         'endings': [f'{verb} [step] the {thing}.' for verb, thing in zip(
             ('eats', 'sees', 'writes down', 'is'), ('cat' * (1 + k % 3), 'sun', 'sum', 'table'))]}
        for k, (name, who) in enumerate((a, b) for a in ('A man', 'Bob', 'The dog')
                                        for b in ('he', 'she', 'then', 'nobody'))]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text('\n'.join(map(json.dumps, ROWS)))
    return path


class Knowing:
    """A model that has read the rows: +10 on each next token of the chosen ending, -10 on those of
    the others, found by what was seen so far."""

    class config:
        block_size = 512

    def __init__(self, protocol, choose):
        self.next = {}
        for row in ROWS:
            context, endings = hellaswag.render(row, BYTES, protocol)
            for k, ending in sorted(enumerate(endings), key=lambda e: e[0] == choose(row)):
                ids = [*context, *ending]
                for n in range(len(context), len(ids)):
                    self.next[tuple(ids[:n])] = ids[n], 10.0 if k == choose(row) else -10.0

    def __call__(self, ids, positions=None, mask=None):
        logits = torch.zeros(*ids.shape, BYTES.n_vocab)
        for b, t in ((b, t) for b in range(len(ids)) for t in range(ids.size(1))):
            seen = ids[b, :t + 1] if mask is None else ids[b][mask[b, 0, t]]
            if found := self.next.get(tuple(seen.tolist())):
                logits[b, t, found[0]] = found[1]
        return logits


@pytest.mark.parametrize('protocol', hellaswag.PROTOCOLS)
@pytest.mark.parametrize('share', [True, False])
def test_an_oracle_is_always_right_and_its_opposite_never(protocol, share):
    """In both measures: no row is lost, and every ending is scored from its first token on."""
    for choose, right in ((lambda row: row['label'], 12), (lambda row: (row['label'] + 1) % 4, 0)):
        found = hellaswag.evaluate(Knowing(protocol, choose), BYTES, ROWS, protocol, share=share)
        assert (sum(found['acc_norm']), sum(found['acc'])) == (right, right)


def test_a_constant_scorer_takes_the_shortest_and_the_first():
    """By the sum the fewest tokens win; by the mean of tokens all are equal and the first is
    taken; by characters the most characters for a token."""
    for protocol in hellaswag.PROTOCOLS:
        items = [hellaswag.render(row, BYTES, protocol) for row in ROWS]
        scores = [[SimpleNamespace(sum=-4.0 * len(e), count=len(e)) for e in endings]
                  for _, endings in items]
        found = hellaswag.grade(ROWS, scores, protocol)
        lengths = [[len(e) for e in endings] for _, endings in items]
        assert found['acc'] == [row['label'] == n.index(min(n)) for row, n in zip(ROWS, lengths)]
        if protocol == 'completion':
            assert found['acc_norm'] == [row['label'] == 0 for row in ROWS]
        else:
            rates = [[len(hellaswag.clean(e)) / n for e, n in zip(row['endings'], ns)]
                     for row, ns in zip(ROWS, lengths)]
            assert found['acc_norm'] == [row['label'] == r.index(max(r))
                                         for row, r in zip(ROWS, rates)]


def test_the_protocols_render_as_their_authors_do():
    """completion: the text as it is; lm-eval: activity, capital, no brackets, one space for two."""
    row = {**ROWS[0], 'ctx_a': 'A [title] b  c.', 'ctx_b': 'he MAY',
           'ctx': 'A [title] b  c. he MAY'}
    context, endings = hellaswag.render(row, BYTES, 'completion')
    assert BYTES.decode(list(context)) == row['ctx']
    assert BYTES.decode(list(endings[0])) == ' eats [step] the cat.'
    context, endings = hellaswag.render(row, BYTES, 'lm-eval')
    assert BYTES.decode(list(context)) == 'Sitting down: A. b c. He may'
    assert BYTES.decode(list(endings[0])) == ' eats the cat.'
    with pytest.raises(ValueError, match="no 'ctx_a', which the protocol lm-eval needs"):
        hellaswag.render({k: v for k, v in row.items() if k != 'ctx_a'}, BYTES, 'lm-eval')


def test_parts_encoded_alone_are_the_whole_encoded(real, gpt2):
    """With GPT-2's tokens, on original rows: none reaches across the space before an ending."""
    encoding = gpt2
    rows, _ = benchmarks.hellaswag(real('hellaswag/hellaswag_val_original_500.jsonl'))
    for row in rows:
        for protocol in hellaswag.PROTOCOLS:
            context, endings = hellaswag.render(row, encoding, protocol)
            texts = row['ctx'], row['endings']
            if protocol == 'lm-eval':
                texts = encoding.decode(list(context)), map(hellaswag.clean, row['endings'])
            for ending, ids in zip(texts[1], endings):
                whole = tokenizer.encode(encoding, f'{texts[0]} {ending}').tolist()
                assert whole == [*context, *ids]


def test_the_dummy_share_of_label_0(real):
    """A scorer of equal means is right where the label is 0: 2,515 of 10,042."""
    rows, _ = benchmarks.hellaswag(real('hellaswag/hellaswag_val_cleaned.jsonl'))
    scores = [[SimpleNamespace(sum=-4.0, count=1)] * 4 for _ in rows]
    assert sum(hellaswag.grade(rows, scores, 'completion')['acc_norm']) == 2515


def test_the_script_from_end_to_end(data, stories, tmp_path, capsys):
    """A run is scored twice, plainly and shared: the same answers, the JSON and a line a question;
    the comparison of the two is within noise."""
    run = tmp_path / 'run'
    command(train, '--dataset=tiny', f'--data_dir={stories}', f'--out_dir={run}', '--n_layer=1',
            '--n_head=2', '--n_embd=16', '--block_size=64', '--batch_size=2', '--max_iters=2',
            '--compile=False', '--dtype=float32', '--hellaswag_interval=1', '--hellaswag_limit=5',
            f'--hellaswag_data={data}')
    log = [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]
    curve = {record['step']: record for record in log if 'hellaswag' in record}
    assert list(curve) == [0, 1, 2]
    first = script('hellaswag.py', '-m', run, f'--data={data}', '--out', tmp_path / 'a.json',
                   f'--dump={tmp_path}/rows', '-d', 'cpu').stdout
    command(hellaswag, '--model', run, f'--data={data}', f'--out={tmp_path}/b.json',
            '--share=False', '--protocol=completion')
    a, b = (json.loads((tmp_path / f'{name}.json').read_text()) for name in 'ab')
    assert [m['items'] for m in a['measures'].values()] == [
        m['items'] for m in b['measures'].values()]
    assert a['model']['sha256'] == b['model']['sha256'] and a['tokens'] < b['tokens']
    assert a['data']['sha256'] == files.sha256(data)
    assert a['model']['dtype'] == 'float32' and a['versions']['torch'] == torch.__version__
    assert f"{a['measures']['acc_norm']['correct']}/12" in first and 'chance: 25 %' in first
    assert 'not known to be the official file: compare with nothing published' in first
    assert 'protocol completion, float32' in first and 'activitynet' in first
    dumped = [json.loads(line) for line in (tmp_path / 'rows').read_text().splitlines()]
    assert [row['i'] for row in dumped] == list(range(12))
    best = [max(range(4), key=lambda k: row['sums'][k] / row['counts'][k]) for row in dumped]
    assert [k == row['label'] for k, row in zip(best, dumped)] == [row['right'] for row in dumped]
    capsys.readouterr()
    command(hellaswag, f'--compare={tmp_path}/a.json,{tmp_path}/b.json')
    assert capsys.readouterr().out.count('within noise') == 2

    # the live curve said of the best step what the script says of it, over the same questions
    command(hellaswag, '-m', run, f'--data={data}', '--limit=5', f'--out={tmp_path}/c.json')
    c = json.loads((tmp_path / 'c.json').read_text())
    assert 'only the first 5 questions: compare with nothing' in results.format_result(c)
    assert results.result_path(c).name == (
        f'hellaswag-completion-first5-rows-{files.sha256(data)[:8]}.json')
    step = int(c['model']['folder'].rpartition('_')[2])
    assert curve[step]['hellaswag'] == c['measures']['acc_norm']['value']
    assert curve[step]['hellaswag_sum'] == c['measures']['acc']['value']


def test_the_model_may_be_on_another_device_than_the_world():
    """As the copy that a run scores may be: rows go to where its weights are."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=BYTES.n_vocab)).eval()
    alone = hellaswag.evaluate(model, BYTES, ROWS)
    other = hellaswag.evaluate(model, BYTES, ROWS, world=World(device=torch.device('meta')))
    sums = [[[score.sum for score in four] for four in answers['scores']]
            for answers in (alone, other)]
    assert sums[0] == sums[1] and alone['acc'] == other['acc']


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_scores(data, tmp_path):
    """To the last bit: a batch holds the same rows whoever reads it."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=BYTES.n_vocab))
    checkpoints.save(tmp_path / 'model', 0, model, BYTES, {})
    for module, given in ((hellaswag, 'data'), (eval_lm, 'file')):
        flags = ['--model', tmp_path / 'model', f'--{given}={data}', '--batch_tokens=300', '-d',
                 'cpu']
        command(module, *flags, f'--out={tmp_path}/1.json')
        script(f'{module.__name__}.py', *flags, f'--out={tmp_path}/3.json', torchrun=3)
        one, three = (json.loads((tmp_path / f'{n}.json').read_text()) for n in (1, 3))
        assert (one['processes'], three['processes']) == (1, 3)
        assert one['measures'] == three['measures']     # of a text also the sum of its nats


def test_training_is_the_same_with_and_without_the_live_curve(data, stories, tmp_path):
    """Scoring draws no random numbers and leaves the model in training mode."""
    losses = []
    for n in (0, 1):
        cfg = train.Config(dataset='tiny', data_dir=str(stories), out_dir=str(tmp_path / str(n)),
                           n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=2, dropout=0.1,
                           max_iters=4, log_interval=1, compile=False, dtype='float32',
                           device='cpu', hellaswag_interval=n, hellaswag_data=str(data))
        train.main(cfg)
        log = [json.loads(line) for line in (tmp_path / str(n) / 'log.jsonl').open()]
        losses.append([record['loss'] for record in log if 'loss' in record])
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_questions_can_be_downloaded_alone(data, capsys):
    command(hellaswag, f'--data={data}', '--download', '--model=nowhere')
    assert capsys.readouterr().out == f'{data}\n'


@pytest.mark.parametrize('flags, words', [
    (['--protocol=lmeval'], "protocol: given 'lmeval', expected one of completion, lm-eval"),
    (['--limit=-1'], 'limit: given -1, expected 0 or more'),
    (['--model=random:gpt3'], 'random:gpt3: expected random: and one of gpt2, gpt2-medium'),
    (['--data=nothing.jsonl'], 'nothing.jsonl: cannot read this file'),
    (['--compare=a.json'], 'expected two results'),
    (['--out=tests'], 'tests: is a folder, expected a plain file'),
    (['--dump=tests'], 'tests: is a folder, expected a plain file')])
def test_bad_input_is_refused(data, flags, words):
    with pytest.raises(ValueError, match=words):
        command(hellaswag, f'--data={data}', *flags)


def test_a_refusal_is_one_line(tmp_path):
    done = script('hellaswag.py', '--data', tmp_path, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_an_ending_that_is_all_brackets_is_scored(data):
    """lm-eval's text of it is empty: no characters to divide by."""
    row = {**ROWS[0], 'endings': ['[title]', 'a.', 'b.', 'c.']}
    found = hellaswag.evaluate(Knowing('lm-eval', lambda row: 0), BYTES, [row], 'lm-eval')
    assert len(found['acc_norm']) == 1


def test_the_run_refuses_at_its_start_what_it_could_not_score(data, stories, tmp_path):
    with pytest.raises(ValueError, match='no room for a context in a block of 8: a model with'):
        command(train, '--dataset=tiny', f'--data_dir={stories}', '--block_size=8', '--n_layer=1',
                f'--out_dir={tmp_path}/x', '--hellaswag_interval=1', f'--hellaswag_data={data}')
    assert not (tmp_path / 'x').exists()


def test_published_numbers_are_printed_for_official_weights_and_data(data, tmp_path, monkeypatch,
                                                                     capsys):
    """As if this model and these rows were the official ones."""
    checkpoints.save(tmp_path / 'model', 0, GPT(GPTConfig(
        n_layer=1, n_head=2, n_embd=16, vocab_size=BYTES.n_vocab)), BYTES, {})
    flags = ['-m', tmp_path / 'model', f'--data={data}', f'--out={tmp_path}/a.json']
    for official, limit, shown in ((False, 0, 0), (True, 0, 2), (True, 3, 0), (True, 99, 2)):
        if official:
            monkeypatch.setattr(checkpoints, 'official_name', lambda name: 'gpt2')
            monkeypatch.setitem(benchmarks.SOURCES, 'hellaswag', ('', files.sha256(data), ''))
        command(hellaswag, *flags, f'--limit={limit}')
        assert capsys.readouterr().out.count('llm.c and build-nanogpt: ') == shown


def test_published_numbers_stand_beside_official_weights_and_data_only(tmp_path):
    """The counts behind them: 2967 and 2871 of 10,042 for gpt2."""
    for key, count in (('acc_norm', 2967), ('acc', 2871)):
        value, _ = results.PUBLISHED['hellaswag-completion', key, 'gpt2']
        assert round(count / 100.42, 2) == value
    for (name, key, size), (value, source) in results.PUBLISHED.items():
        assert size in SIZES and source
        if name.startswith('hellaswag'):
            assert name.removeprefix('hellaswag-') in hellaswag.PROTOCOLS and 25 < value < 60
