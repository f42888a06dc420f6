"""What a person can put right, apart from what is a bug."""


class UserError(ValueError):
    """A value or the content of a file that a person can put right; the message says what, and how.

    Commands show it, and OSError, as one line. Any other exception that reaches a command is a bug of this package.
    """
