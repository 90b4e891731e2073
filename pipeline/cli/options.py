"""What flags must say."""

from collections.abc import Callable

from storage.errors import UserError


def need(value: str | None, flag: str) -> str:
    """The value, or an error that names the flag."""
    if value is None:
        raise UserError(f"{flag} is missing; give the flag or set it in the run file")
    return value


def renamed(flag: str) -> Callable[[str | None], None]:
    """Callback of a flag that has another name now, and says which."""

    def refuse(value: str | None) -> None:
        if value is not None:
            raise UserError(f"this flag is called {flag} now; give {flag} {value}")

    return refuse


def percent(text: str) -> float:
    """What `5%` says."""
    try:
        return float(text.removesuffix("%"))
    except ValueError:
        raise UserError(f"--sample is {text!r}, expected a percentage such as 5%") from None
