"""The one exception type whose message is meant for the user."""


class UserError(Exception):
    """Bad input, explained in one line: what, where, expected, found, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        # Names from files stand in messages: a line break or a terminal's control characters are shown, not obeyed.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
