"""A prompt as a user gives it in `start`: its text, and its tokens."""

import io

from core.cli import errors, files
from core.cli.errors import UserError
from core.text.tokenizer import Tokenizer


def prompt_text(start: str) -> str:
    """The text of a prompt: of a file for 'FILE:name', otherwise `start`. UserError where a file can't be read."""
    if not start.startswith('FILE:'):
        if '\\n' in start:
            errors.notice(r"start holds a backslash and an n; a newline is written --start=$'\n' in a shell")
        return start
    try:
        content = files.read_bytes(start[5:], most=1 << 26)
        return io.TextIOWrapper(io.BytesIO(content), encoding='utf-8-sig', newline=None).read()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise UserError(f"the prompt {start[5:]} can't be read ({error}); name a UTF-8 text file") from error


def prompt_ids(tokenizer: Tokenizer, text: str, is_default: bool) -> list[int]:
    """The tokens of a prompt. UserError where there are none, or a character that the tokenizer has no token for."""
    try:
        ids = tokenizer.encode(text, special=True)
    except UserError as error:
        if is_default:
            raise UserError(f'the prompt is a newline unless --start gives another, and {error}') from error
        raise
    if not ids:
        raise UserError('start is empty; the prompt must contain at least one token (the default is a newline)')
    return ids
