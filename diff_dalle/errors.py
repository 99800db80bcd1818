"""The one exception that reaches a user: a mistake that they can mend."""


class UsageError(Exception):
    """A wrong input, found before or during work.

    The message is one line that says what is wrong, where, and what to do.
    Scripts print it without a traceback and exit with a code that is not 0.
    """
