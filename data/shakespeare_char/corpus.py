"""
Finds the text of Shakespeare for data/shakespeare_char/prepare.py and data/shakespeare/prepare.py.

tinyshakespeare is public domain; the copy used everywhere is that of https://github.com/karpathy/char-rnn. It is looked
for in this order: the file that the user names, `input.txt` beside the scripts, the network; where all that fails, the
stand-in corpus of stand_in.py, with a warning.
"""

import hashlib
import http.client
import os
import time
import urllib.request
from pathlib import Path

import stand_in

from core.runtime import UserError, notice
from core.tokenizer import within
from core.write_dataset import sync, temporary

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
SECONDS = 10  # to connect, and as long again for the rest
LARGEST = 1 << 29  # bytes; the text is held in memory

WARNING = """\
############################################################################
#                                                                          #
#   WARNING: this is NOT Shakespeare.                                      #
#                                                                          #
#   tinyshakespeare could not be downloaded, so a generated stand-in of    #
#   the same size and the same 65 characters takes its place. Losses on    #
#   it can't be compared with losses on the real text.                     #
#                                                                          #
#   For the real one, get input.txt on a machine with a network from       #
#   github.com/karpathy/char-rnn (folder data/tinyshakespeare), then run   #
#       python data/{name:<52}   #
#                                                                          #
############################################################################"""


def find(given, folders, download=True, url=URL):
    """
    The text to prepare: (text, source, sha256); source is one line that says which corpus it is.

    given: a path, or '' for tinyshakespeare. folders: where a copy called input.txt may lie; a download is kept in the
    first. download: False leaves the network alone. UserError if the file that was given can't be used.
    """
    if given:
        return read(Path(given))
    for folder in folders:
        if (folder / 'input.txt').is_file():
            return read(folder / 'input.txt')
    reason = 'the network was not to be used (--download=False)'
    if download:
        try:
            data = within(2 * SECONDS, lambda: fetch(url))
            keep(data, folders[0] / 'input.txt')
            return data.decode('utf-8'), 'tinyshakespeare', SHA256
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f'{type(error).__name__}: {error}'
    notice(WARNING.format(name=f'{folders[0].name}/prepare.py --input=input.txt'))
    notice(f'# The reason: {" ".join(reason.split())}')
    text = stand_in.generate()
    return text, 'stand-in corpus (generated)', hashlib.sha256(text.encode('utf-8')).hexdigest()


def read(path):
    """A text file as (text, source, sha256). UserError if it is missing, empty, huge or not UTF-8."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f'{path} is too large for this script; use data/text/prepare.py, which takes any size')
        data = path.read_bytes()
        text = data.decode('utf-8-sig').replace('\r\n', '\n')
    except OSError as error:
        raise UserError(f"--input={path} can't be read ({error.strerror}); give the path of a text file") from error
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise UserError(f'{path} is not UTF-8 text (line {line}); save it as UTF-8') from error
    checksum = hashlib.sha256(data).hexdigest()
    return text, 'tinyshakespeare' if checksum == SHA256 else f'file {path.name}', checksum


def fetch(url):
    """The bytes of tinyshakespeare from the network. OSError or ValueError if they can't be had or are not those."""
    start, parts = time.monotonic(), []
    with urllib.request.urlopen(url, timeout=SECONDS) as reply:
        while part := reply.read(1 << 16):
            parts.append(part)
            if time.monotonic() - start > 2 * SECONDS or len(parts) > 1000:
                raise TimeoutError('the download takes too long')
    data = b''.join(parts)
    checksum = hashlib.sha256(data).hexdigest()
    if checksum != SHA256:
        raise ValueError(f'what {url} sent has the SHA-256 {checksum[:16]}... and not {SHA256[:16]}...')
    return data


def keep(data, path):
    """Save a download, so that the network is needed once. Where the folder can't be written, it is needed again."""
    beside = temporary(path)
    try:
        with open(beside, 'wb') as file:
            file.write(data)
            sync(file)
        os.replace(beside, path)
    except OSError as error:
        notice(f"note: {path} can't be kept ({error.strerror}); the next run downloads it again")
        beside.unlink(missing_ok=True)
