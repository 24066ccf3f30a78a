"""
One run on two hosts: network namespaces of Linux, joined by a link that can be taken down.

Real torchrun, one agent and one process on each host, gloo. Both see the folder of the run. Needs
root and iproute2; without them all of it is skipped.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from conftest import ROOT, TINY, curve

from gpt import steps

pytestmark = pytest.mark.slow

PORT = 29400
SETTINGS = dict(max_iters=100, eval_interval=20, total_batch_size=64 * 16, timeout_minutes=0.1)
ELASTIC = '--nnodes=1:2', '--max-restarts=3'
QUICK = ',last_call_timeout=2,join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=5'


def ip(*args, check=True):
    return subprocess.run(['ip', *args], check=check, capture_output=True, text=True)


class Host:
    """A namespace: an address, one end of the link, and the processes in it."""

    def __init__(self, name, address, store):
        self.name, self.address, self.store, self.started = name, address, store, []

    def __call__(self, *args):
        return ip('-n', self.name, *args)

    def torchrun(self, folder, *launcher, conf='', loop=False):
        """Start torchrun here, with train.py in `folder`; `loop`: again until it ends with status
        0. The host name is the same in both namespaces, so the agent is given its address."""
        values = {**TINY, **SETTINGS, 'data_dir': folder.parent / 'data', 'out_dir': folder}
        command = [sys.executable, '-m', 'torch.distributed.run', *launcher, '--nproc_per_node=1',
                   '--rdzv_backend=c10d', f'--rdzv_endpoint={self.store}:{PORT}', '--rdzv_id=run',
                   f'--rdzv_conf=is_host={int(self.address == self.store)}{conf}',
                   f'--local_addr={self.address}', 'train.py',
                   *(f'--{key}={value}' for key, value in values.items())]
        if loop:
            command = ['bash', '-c', 'until "$@"; do sleep 1; done', 'bash', *command]
        output = folder.parent / f'{self.address}-{len(self.started)}.txt'
        with open(output, 'wb') as file:
            process = subprocess.Popen(
                ['ip', 'netns', 'exec', self.name, *command], cwd=ROOT, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, 'GLOO_SOCKET_IFNAME': 'veth0', 'PYTHONUNBUFFERED': '1'})
        process.output = output.read_text                         # its output so far
        self.started.append(process)
        return process

    def pids(self, but=None):
        """The processes here, except the one that was started as `but`."""
        found = map(int, ip('netns', 'pids', self.name, check=False).stdout.split())
        return [pid for pid in found if but is None or pid != but.pid]

    def kill(self, but=None):
        for pid in self.pids(but):
            with suppress(ProcessLookupError):                  # it has just ended
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def hosts():
    """Two hosts that reach each other; the first one holds the store."""
    if os.geteuid() or not shutil.which('ip'):
        pytest.skip('network namespaces need root and iproute2')
    addresses = '10.213.0.1', '10.213.0.2'
    a, b = (Host(f'gpt2-{os.getpid()}-{i}', address, addresses[0])
            for i, address in enumerate(addresses))
    try:
        try:
            for host in (a, b):
                ip('netns', 'add', host.name)
                ip('netns', 'exec', host.name, 'true')
            ip('link', 'add', 'veth0', 'netns', a.name, 'type', 'veth',
               'peer', 'name', 'veth0', 'netns', b.name)
            for host in (a, b):
                host('addr', 'add', f'{host.address}/24', 'dev', 'veth0')
                for link in ('lo', 'veth0'):
                    host('link', 'set', link, 'up')
        except subprocess.CalledProcessError as error:
            pytest.skip(f'no network namespaces here: {error.stderr.strip()}')
        yield a, b
    finally:
        for host in (a, b):
            for _ in range(3):                                  # a loop may just have started again
                host.kill()
            for process in host.started:
                process.wait()
            ip('netns', 'del', host.name, check=False)


@pytest.fixture
def one_machine(undisturbed):
    """The same run on one machine, by torchrun with two processes."""
    return undisturbed(2, **SETTINGS)


@pytest.fixture
def run(stories, tmp_path):
    """The folder of a run, beside the data."""
    (tmp_path / 'data').symlink_to(stories)
    return tmp_path / 'run'


def wait_for(condition, *processes, seconds=300):
    deadline = time.time() + seconds
    while time.time() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError('\n\n'.join(process.output() for process in processes))


def ends(*processes):
    """Each of them, with exit status 0."""
    wait_for(lambda: all(process.poll() is not None for process in processes), *processes,
             seconds=300)
    assert [process.returncode for process in processes] == [0] * len(processes), (
        '\n\n'.join(process.output() for process in processes))


def worlds(process):
    """The numbers of processes that the run had, one after another, as rank 0 printed them."""
    return list(map(int, re.findall(r'tokens = (\d+) process', process.output())))


def reached(folder, step):
    log = folder / 'log.jsonl'
    return lambda: log.exists() and f'"step": {step},' in log.read_text()


def weights(folder):
    return (folder / f'step_{SETTINGS["max_iters"]:07d}/model.safetensors').read_bytes()


def test_two_hosts_train_as_one_machine_does(hosts, run, one_machine):
    processes = [host.torchrun(run, '--nnodes=2') for host in hosts]
    ends(*processes)
    assert worlds(processes[0]) == [2] and worlds(processes[1]) == []
    assert curve(run) == curve(one_machine)
    assert weights(run) == weights(one_machine)


@pytest.mark.faults
@pytest.mark.parametrize('how', ['killed', 'cut off'])
def test_a_host_is_lost_and_comes_back(hosts, run, one_machine, how, monkeypatch):
    """The other one continues alone from the last checkpoint, and with it again when it is back.
    Its process is paused until then, so that the run does not end before. Losses differ by
    rounding."""
    monkeypatch.setenv('TORCH_DISABLE_SHARE_RDZV_TCP_STORE', '1')       # a returning host needs it
    a, b = hosts
    staying, lost = (host.torchrun(run, *ELASTIC, conf=QUICK) for host in hosts)
    wait_for(reached(run, 30), staying, lost)
    if how == 'cut off':
        b('link', 'set', 'veth0', 'down')               # gloo waits for timeout_minutes, then fails
    else:
        b.kill()                                        # its connections close: seen at once
    wait_for(lambda: staying.output().partition('= 1 process ')[2].count('\nstep') > 2, staying,
             lost)
    [alone] = a.pids(but=staying)
    os.kill(alone, signal.SIGSTOP)
    b.kill()                        # torchrun there may hang for minutes; only one may run
    b('link', 'set', 'veth0', 'up')
    back = b.torchrun(run, *ELASTIC, conf=QUICK)
    wait_for(lambda: 'closing signal SIGTERM' in staying.output(), staying, back)
    os.kill(alone, signal.SIGCONT)                      # it saves, and both start from there
    ends(staying, back)
    assert worlds(staying) == [2, 1, 2]
    assert staying.output().count('the same command resumes') == 1
    found, expected = curve(run), curve(one_machine)
    assert found.keys() == expected.keys()
    pairs = [(float.fromhex(found[step][i]), float.fromhex(expected[step][i]))
             for step in expected for i in (0, 3) if expected[step][i] and found[step][i]]
    worst = max(abs(a - b) / b for a, b in pairs)
    print(f'{how}: largest relative difference {worst:.1e}')
    assert worst < 1e-5 and len(pairs) >= 100


@pytest.mark.faults
@pytest.mark.parametrize('victim', [0, 1])
def test_an_outer_loop_brings_any_host_back(hosts, run, one_machine, victim):
    """Two hosts or none, each in a loop: one is killed, the one that holds the store or the other.
    Both start again, and the run equals one without a fault."""
    processes = [host.torchrun(run, '--nnodes=2', conf=',join_timeout=60', loop=True)
                 for host in hosts]
    wait_for(reached(run, 30), *processes)
    hosts[victim].kill(but=processes[victim])
    ends(*processes)
    assert worlds(processes[0]) == [2, 2]
    assert max(steps.all_steps(run)) == SETTINGS['max_iters']
    assert curve(run) == curve(one_machine)
    assert weights(run) == weights(one_machine)
