"""The one exception a person is meant to read."""


class UserError(Exception):
    """The recipe, the data or the model handed in is wrong.

    The message is one line that names the key or the `file:line` and says what was expected; `main` prints it to
    stderr without a traceback and exits with status 2.
    """
