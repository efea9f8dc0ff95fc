"""The one exception that is shown to people without a traceback."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: says what was got, what is needed, what to type."""
