"""What the user can get wrong, as one exception type that the command line turns into exit status 2."""

from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong: the message names the file and line or the key, what was found and what was expected."""

    @classmethod
    def from_problems(cls, title: str, problems: Iterable[str], *, advice: str | None = None) -> "UserError":
        """Report every problem at once, one per line below `title`; `advice` on what to do comes last."""
        return cls("\n".join([title, *(f"  - {problem}" for problem in problems), *([advice] if advice else [])]))
