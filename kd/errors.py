"""What is shown to people without a traceback."""

import errno


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: says what was got, what is needed, what to type."""


# What may be a mistake: whether an OSError is one, is_mistake() tells.
MISTAKES = (UserError, OSError)
PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)


def is_mistake(error: BaseException) -> bool:
    """Whether a person can mend it: a UserError, or a place that cannot be read or written to."""
    kinds = (UserError, PermissionError, NotADirectoryError, FileExistsError)
    return isinstance(error, kinds) or (isinstance(error, OSError) and error.errno in PLACE)


def for_people(error: Exception) -> UserError:
    """A mistake with what to do about it; any other error is raised again."""
    if isinstance(error, UserError):
        return error
    if not is_mistake(error):
        raise error
    return UserError(
        f"{error}. Choose a folder that can be read and written, e.g. by root=/other/folder (for a report, --root)."
    )


def check(option: str, got, good: bool, need: str) -> None:
    """Raise UserError unless the value that an option got is good."""
    if not good:
        raise UserError(f"{option}={got}: need {need}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
