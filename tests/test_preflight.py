"""What --plan says, and that it changes nothing."""

import re

import train


def test_a_plan_says_what_the_run_takes_and_writes_nothing(config, tmp_path, capsys):
    assert train.main(config(plan=True, max_iters=5000)) == 0
    text = capsys.readouterr().out
    for part in ('device', 'dtype', 'compiler', 'data', 'vocabulary', 'batch', 'disk'):
        assert re.search(rf'^{part} +(?!FAILS)\S', text, re.M), text
    assert re.search(r'a full update takes [\d.e-]+ s: [\d,]+ tokens/s, mfu \d+%; peak memory',
                     text)
    assert re.search(r'5,000 updates, 1.3M tokens: [\d.]+ minutes', text)
    assert text.count('device ') == text.count('micro-batches x') == 1
    assert not (tmp_path / 'run').exists()


def test_a_plan_names_all_that_is_wrong(config, tmp_path, capsys):
    assert train.main(config(plan=True, dataset='nowhere', device='cuda:7', total_batch_size=100,
                             dtype='float8')) == 2
    text = capsys.readouterr().out
    for part, remedy in (('device', '--device=cpu'), ('dtype', "'bfloat16'"), ('batch', '=128'),
                       ('data', 'python data/prepare.py --name=nowhere')):
        assert re.search(rf'^{part} +FAILS: .*\n?.*{remedy}', text, re.M), text
    assert 'disk        not checked' in text and not (tmp_path / 'run').exists()


def test_a_plan_of_a_run_resumes_from_it_and_leaves_it_alone(config, tmp_path, capsys):
    train.main(config())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')}
    train.main(config(plan=True, max_iters=24))
    text = capsys.readouterr().out
    assert f"reading {tmp_path / 'run'}" in text and 'resuming' not in text
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / 'run').rglob('*')}
