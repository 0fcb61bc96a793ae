"""A prompt as a user gives it in `start`: its text, and its tokens."""

from core.cli import errors
from core.cli.errors import UserError
from core.text.text_files import read_text
from core.text.tokenizer import Tokenizer


def prompt_text(start: str, tokenizer: Tokenizer) -> str:
    """The text of a prompt: of a file for 'FILE:name', otherwise `start`. UserError where a file can't be read."""
    if start == 'FILE:':
        raise UserError("start='FILE:' names no file and can't be read; name a text file")
    if start.startswith('FILE:'):
        return read_text(start[5:], 1 << 26, tokenizer)
    if '\\n' in start:
        errors.notice(r"start holds a backslash and an n; a newline is written --start=$'\n' in a shell")
    return start


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
