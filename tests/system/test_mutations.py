"""tests/mutations.py: every mutation still has its line, once, and tests that should notice."""

from mutations import MUTATIONS, ROOT, files_of


def test_every_mutation_can_be_made():
    for what, file, before, after, tests in MUTATIONS:
        assert (ROOT / file).read_text().count(before + '\n') == 1 and before != after, what
        assert all(len(files_of(ROOT, name)) == 1 for name in tests.split()), what
