"""Files: written completely or not at all; downloads that break off, resume, or are wrong."""

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, script

from gpt import files


@pytest.mark.parametrize('content', ['a text: é 世界\n', b'bytes \xff\0'])
def test_atomic_write_replaces_a_file(tmp_path, content):
    path = tmp_path / 'a.txt'
    for _ in range(2):
        files.atomic_write(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch, step):
    def fails(*_):
        raise OSError('no space left')

    path = tmp_path / 'a.txt'
    files.atomic_write(path, 'before')
    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match='no space left'):
        files.atomic_write(path, 'after')
    assert path.read_text() == 'before' and list(tmp_path.iterdir()) == [path]


def test_the_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, 'fsync', lambda file: (calls.append('fsync'), sync(file)))
    monkeypatch.setattr(os, 'replace', lambda *paths: (calls.append('replace'), replace(*paths)))
    files.atomic_write(tmp_path / 'a', 'text')
    assert calls == ['fsync', 'replace']


def test_only_plain_files_are_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to('/dev/zero')
    for path in (tmp_path, tmp_path / 'pipe', tmp_path / 'link', '/dev/zero'):
        with pytest.raises(ValueError, match='is a (folder|device, pipe or socket), expected'):
            files.read_bytes(path)
    with pytest.raises(ValueError, match='nothing: cannot read this file'):
        files.read_text(tmp_path / 'nothing')
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'a').write_text('a')
    assert files.read_text('~/a') == 'a'


@pytest.mark.parametrize('name, words', [
    ('folder', 'is a folder'), ('new/', 'is a folder'), ('link_to_folder', 'is a folder'),
    ('pipe', 'is a device, pipe'), ('/dev/null', 'is a device'), ('data', 'is an input'),
    ('link_to_data', 'is an input'), ('folder/../data', 'is an input')])
def test_what_must_not_be_written_is_refused(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'data').write_text('data')
    (tmp_path / 'link_to_data').symlink_to('data')
    (tmp_path / 'link_to_folder').symlink_to('folder')
    os.mkfifo('pipe')
    with pytest.raises(ValueError, match=words):
        files.check_output(name, '', 'nothing', 'data')
    assert (tmp_path / 'data').read_text() == 'data'


def test_standard_output_is_not_replaced_by_a_file(tmp_path):
    code = 'import sys; from gpt.files import check_output; check_output(sys.argv[1])'
    for name in ('/dev/stdout', tmp_path / 'out'):
        with open(tmp_path / 'out', 'w') as file:
            done = subprocess.run([sys.executable, '-c', code, name], cwd=ROOT, stdout=file,
                                  stderr=subprocess.PIPE, text=True)
        assert 'a standard stream' in done.stderr


def test_a_file_to_be_written_gets_its_folder_and_a_link_stays_one(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert files.check_output('~/a/b/c.json') == tmp_path / 'a/b/c.json'
    assert (tmp_path / 'a/b').is_dir()
    (tmp_path / 'c').write_text('old')
    (tmp_path / 'link').symlink_to('c')
    files.atomic_write(tmp_path / 'link', 'new')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'c').read_text() == 'new'
    with pytest.raises(ValueError, match='null: is a device'):
        files.atomic_write('/dev/null', 'x')


@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_the_umask_is_honoured(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.atomic_write(tmp_path / 'a', 'x')
    finally:
        os.umask(before)
    assert (tmp_path / 'a').stat().st_mode & 0o777 == 0o666 & ~umask


def test_one_process_holds_the_lock(tmp_path):
    with open(tmp_path / 'lock', 'a') as first, open(tmp_path / 'lock', 'a') as second:
        files.lock(first)
        with pytest.raises(BlockingIOError):
            files.lock(second, wait=False)
    with open(tmp_path / 'lock', 'a') as third:
        files.lock(third, wait=False)                               # released when closed


def test_it_imports_no_torch():
    code = 'import sys, gpt.files; print("torch" in sys.modules)'
    assert script('-c', code).stdout == 'False\n'


# Downloads.

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` with ranges, but for /no_ranges; breaks off after `break_after` bytes."""
    files, ranges, break_after = {}, [], None

    def do_GET(self):
        body = self.files.get(self.path)
        if body is None:
            return self.send_error(404)
        asked = self.headers.get('Range')
        self.ranges.append(asked)
        start = int(asked[6:-1]) if asked and self.path != '/no_ranges' else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        end = start + self.break_after if self.break_after else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    """The URL of a Server with no files yet; tries follow each other at once."""
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(time, 'sleep', lambda seconds: None)
    Server.files, Server.ranges, Server.break_after = {}, [], None
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()


@pytest.mark.parametrize('path', ['/file', '/no_ranges'])
def test_a_download_that_broke_off_is_resumed(server, tmp_path, path):
    """Within one call where tries are left, else in the next; no byte comes twice from a
    server with ranges, and one without is read from the start."""
    body = bytes(range(256)) * 40
    Server.files[path], Server.break_after = body, 4096
    sha256, place = hashlib.sha256(body).hexdigest(), tmp_path / 'x'
    with pytest.raises(ValueError, match='the connection broke off'):
        files.download(server + path, place, sha256, tries=2)
    assert not place.exists() and (tmp_path / 'x.partial').exists()
    if path == '/no_ranges':
        Server.break_after = None
    files.download(server + path, place, sha256)
    assert place.read_bytes() == body and not (tmp_path / 'x.partial').exists()
    if path == '/file':
        assert Server.ranges == [None, 'bytes=4096-', 'bytes=8192-']
    files.download(server + path, place, sha256)                    # there already
    assert len(Server.ranges) == 3


def test_a_wrong_partial_file_is_replaced(server, tmp_path):
    """Shorter or longer than the right one."""
    body = b'the right bytes' * 99
    Server.files['/file'], sha256 = body, hashlib.sha256(body).hexdigest()
    for garbage in (b'wrong', body + b'and more'):
        (tmp_path / 'x.partial').write_bytes(garbage)
        files.download(server + '/file', tmp_path / 'x', sha256)
        assert (tmp_path / 'x').read_bytes() == body
        (tmp_path / 'x').unlink()


@pytest.mark.parametrize('path, words', [('/nothing', '404'), ('/file', 'its sha256 is')])
def test_a_bad_download_leaves_no_file(server, tmp_path, path, words):
    Server.files['/file'] = b'other bytes'
    with pytest.raises(ValueError, match=f'could not download.*({words}).*put it at'):
        files.download(server + path, tmp_path / 'file.txt', 'ab' * 32)
    assert not (tmp_path / 'file.txt').exists()
