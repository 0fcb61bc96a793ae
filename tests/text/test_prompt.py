"""core/text/prompt.py: a prompt is what its writer meant, and one that the tokens can't express says what to give."""

import pytest

from core.cli.errors import UserError
from core.text.prompt import prompt_ids, prompt_text
from core.text.tokenizer import ByteTokenizer, CharTokenizer

BASES = CharTokenizer('acgt')


def test_the_default_prompt_is_named_where_the_data_has_no_newline():
    with pytest.raises(UserError, match=r"^the prompt is a newline unless --start gives another, and the character '"):
        prompt_ids(BASES, '\n', is_default=True)
    with pytest.raises(UserError, match=r"^the character '\\n' is not among the 4 that the model knows: 'acgt'$"):
        prompt_ids(BASES, '\n', is_default=False)
    assert prompt_ids(BASES, 'cat', is_default=False) == [1, 0, 3]


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match='^start is empty'):
        prompt_ids(ByteTokenizer(), '', is_default=False)


def test_a_file_s_byte_order_mark_and_line_ends_are_those_of_the_training_text(tmp_path):
    path = tmp_path / 'prompt.txt'
    path.write_bytes('\ufefffirst\r\nsecond\rthird\n'.encode())
    assert prompt_text(f'FILE:{path}', CharTokenizer('a')) == 'first\nsecond\nthird\n'


def test_a_newline_that_the_shell_left_as_two_characters_is_noticed(capsys):
    assert prompt_text('a\nb', CharTokenizer('a')) == 'a\nb'
    assert capsys.readouterr().err == ''
    assert prompt_text(r'a\nb', CharTokenizer('a')) == r'a\nb'  # as nanoGPT takes it
    assert (
        capsys.readouterr().err == "start holds a backslash and an n; a newline is written --start=$'\\n' in a shell\n"
    )
