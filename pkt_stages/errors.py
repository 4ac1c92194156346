"""The one exception type whose message is meant for the user."""


class UserError(Exception):
    """Bad input, explained in one line: what, where, expected, found, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
