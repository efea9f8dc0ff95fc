"""What is shown to people without a traceback."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: says what was got, what is needed, what to type."""


# A place that cannot be read, or written to, is such a mistake too.
MISTAKES = (UserError, PermissionError, NotADirectoryError, FileExistsError)


def for_people(error: Exception) -> UserError:
    """One of MISTAKES with what to do about it."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{error}. Choose a folder that can be read and written, e.g. by root=/other/folder.")


def check(option: str, got, good: bool, need: str) -> None:
    """Raise UserError unless the value that an option got is good."""
    if not good:
        raise UserError(f"{option}={got}: need {need}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
