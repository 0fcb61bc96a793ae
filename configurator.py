# Reads config files and flags into a script's block of `name = value  # comment` lines. A script executes this file
# right after the block, in its own globals, as nanoGPT does:
#
#     exec(open(os.path.join(os.path.dirname(__file__), 'configurator.py')).read())
#
#     $ python train.py config/train_shakespeare_char.py --batch_size=32 --compile false
#
# Config files are Python, and apply with the flags from left to right; core/cli/keys.py does the work. It leaves two
# names in the script: `config`, a dict of all keys, to be stored with the script's output, and `given`, the set of the
# keys that a file or a flag set.
#
# This header is a comment because a docstring executed here would replace the script's own.
from core.cli.keys import configure as _configure

config, given = _configure(globals())
del _configure
