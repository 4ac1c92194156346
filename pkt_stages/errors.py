"""The one exception type whose message is meant for the user, and how text from files is shown."""


def printable(text: str) -> str:
    """One line of text: a line break or a terminal's control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UserError(Exception):
    """Bad input, explained in one line: what, where, expected, found, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names from files stand in messages
