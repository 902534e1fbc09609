"""Errors that a user can mend: one clear line, no traceback."""


class UserError(ValueError):
    """A mistake in the input; the message names the thing and the way out."""
