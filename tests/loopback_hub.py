"""A Hugging Face hub on loopback, for the real client: models, data sets, and misbehaviour."""

import hashlib
import json
import os
import re
import threading
import time
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = '0123456789abcdef0123456789abcdef01234567'
CONVERTED = COMMIT[::-1]                # of a data set's branch refs/convert/parquet, NAME@parquet


class Hub(ThreadingHTTPServer):
    """Serves root/OWNER/NAME/FILE, and data sets in root/datasets, as huggingface.co does, and can
    be told to misbehave."""
    daemon_threads = True

    def __init__(self, root):
        super().__init__(('127.0.0.1', 0), Answer)
        self.root, self.requests = root, []
        self.break_off, self.stall = 0, False       # how many downloads end half way; all hang
        self.too_many, self.altered = 0, 0          # how many get a 429, or a damaged file
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'


class Answer(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_HEAD(self):
        hub, path = self.server, urllib.parse.unquote(self.path)
        match = re.fullmatch(r'/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+|refs/[^/]+/[^/]+)/(.+)',
                             path)
        hub.requests.append((self.command, self.path, self.headers.get('Range')))
        if about := re.match(r'/api/(datasets/[^/]+/[^/]+)(/.*)?$', path):
            return self.describe(hub.root / about[1], about[2] or '')
        if not match:
            return self.refuse(404, 'RepoNotFound')
        repo, revision, name = match.groups()
        repo += '@parquet' if revision == CONVERTED else ''
        if repo == 'someone/gated':
            return self.refuse(403, 'GatedRepo')
        if repo == 'someone/private' and self.headers.get('Authorization') != 'Bearer secret':
            return self.refuse(401, 'RepoNotFound')
        if repo == 'someone/broken':
            return self.refuse(500, 'Oops')
        if not (hub.root / repo).is_dir():
            return self.refuse(401, 'RepoNotFound')             # as huggingface.co does
        file = hub.root / repo / name
        if not file.exists():
            return self.refuse(404, 'EntryNotFound')
        data, first = file.read_bytes(), 0
        if given := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            first = int(given[1])
        if self.command == 'GET' and hub.too_many and name.endswith(('.bin', '.parquet')):
            hub.too_many -= 1
            return self.refuse(429, 'TooMany')
        self.send_response(206 if first else 200)
        commit = CONVERTED if '@' in repo else COMMIT
        for key, value in {'X-Repo-Commit': commit, 'ETag': f'"{hash(data):x}"',
                           'Content-Length': len(data) - first, 'Accept-Ranges': 'bytes',
                           'Content-Range': f'bytes {first}-{len(data) - 1}/{len(data)}'}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == 'GET':
            self.send(data[first:], name.endswith(('.safetensors', '.bin', '.parquet')))

    do_GET = do_POST = do_HEAD

    def describe(self, folder, what):
        """The hub's API for a data set: its commit and files, a folder of it, some of its paths."""
        if self.command == 'POST':
            asked = self.rfile.read(int(self.headers['Content-Length'])).decode()
            asked = urllib.parse.parse_qs(asked).get('paths') or json.loads(asked)['paths']
        if not folder.is_dir():
            return self.refuse(401, 'RepoNotFound')
        commit = COMMIT
        if 'refs/convert/parquet' in what or CONVERTED in what:
            folder, commit = folder.with_name(f'{folder.name}@parquet'), CONVERTED
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob('*')
                       if file.is_file())
        if what.startswith('/paths-info/'):
            found = [about(folder, name) for name in asked if (folder / name).exists()]
        elif what.startswith('/tree/'):
            inside = folder / re.sub(r'^/tree/(refs/convert/parquet|[^/?]+)/?|\?.*', '', what)
            found = [about(folder, str(file.relative_to(folder))) for file in sorted(
                inside.rglob('*') if 'recursive=true' in what.lower() else inside.glob('*'))]
        else:
            found = {'_id': '1', 'id': '/'.join(folder.parts[-2:]), 'sha': commit, 'tags': [],
                     'siblings': [{'rfilename': name} for name in names], 'downloads': 0,
                     'private': False, 'gated': False, 'likes': 0}
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send(self, data, is_weights):
        hub, half = self.server, len(data) // 2
        if is_weights and hub.altered:
            hub.altered -= 1
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1:]
        if is_weights and (hub.break_off or hub.stall):
            self.wfile.write(data[:half])
            self.wfile.flush()
            hub.break_off -= 1
            while hub.stall:
                time.sleep(0.05)
            self.close_connection = True
            return self.connection.close()
        self.wfile.write(data)

    def refuse(self, status, code):
        self.send_response(status)
        self.send_header('X-Error-Code', code)
        if code == 'EntryNotFound':
            self.send_header('X-Repo-Commit', COMMIT)           # the client caches what is missing
        self.send_header('X-Error-Message', 'no')
        self.send_header('Content-Length', '0')
        self.end_headers()

    def log_message(self, *_):
        pass


def about(folder, name):
    if (folder / name).is_dir():
        return {'type': 'directory', 'oid': 'd', 'path': name}
    data = (folder / name).read_bytes()
    found = {'type': 'file', 'path': name, 'size': len(data), 'oid': hashlib.sha1(data).hexdigest()}
    if name.endswith(('.bin', '.parquet')):
        found['lfs'] = {'oid': hashlib.sha256(data).hexdigest(), 'size': len(data),
                        'pointerSize': 130}
    return found


@contextmanager
def serving(root, home):
    """A Hub for `root`; its `env` is for client processes, with their cache in `home`."""
    with Hub(root) as server:
        server.env = {**os.environ, 'HF_ENDPOINT': server.url, 'HF_HOME': str(home),
                      'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_PROGRESS_BARS': '1'}
        yield server
        server.stall = False
        server.shutdown()
