"""jaxtune: a JAX trainer that takes a language model from raw text to a model people prefer."""

import os
import pathlib
import sys

from jaxtune.common.deferred import defer

__version__ = '0.1.0'

if sys.argv[:1] == ['-m'] and not sys.flags.safe_path and sys.path[0] == os.getcwd():
    # `python -m jaxtune.main`: Python has put the current folder first, where a yaml.py of the user's would take the
    # place of the library. Their own functions are imported by `jaxtune.common.imports`. A checkout that is not
    # installed stays at the end, for worker processes to find this package.
    del sys.path[0]
    _root = str(pathlib.Path(__file__).resolve().parents[1])
    if _root == os.getcwd() and _root not in sys.path:
        sys.path.append(_root)

# transformers imports PyTorch wherever it is installed, for seconds; nothing here uses it.
defer('torch')
