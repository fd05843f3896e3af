"""The exceptions of medseg.

::

    MedsegError               anything that medseg refuses, with the reason and the way out
    ├── InputError            a file or value given by the user
    │   ├── UnreadableFile    damaged, truncated, or of no known format
    │   ├── GeometryMismatch  two grids that must be one differ
    │   └── IncompleteSeries  an image series with gaps or repeated slices
    ├── DatasetError          a dataset that cannot be used; lists every bad case, not the first
    ├── PlanError             a plan field with an impossible value; names the field and what is allowed
    ├── TrainingError         training cannot go on, with a diagnosis
    └── PackageError          a model package that is incomplete, altered or of another schema version

Every message says where, what was found, what was expected and what to do, in that order.
"""


class MedsegError(Exception):
    """Base of every error that medseg raises on purpose.

    Args:
        where: the file, case or field concerned.
        found: what was found there.
        expected: what was expected instead.
        remedy: what the user can do about it.
    """

    def __init__(self, where: object, found: str, expected: str = "", remedy: str = "") -> None:
        self.where = str(where)
        self.found = found
        self.expected = expected
        self.remedy = remedy
        message = f"{self.where}: {found}"
        if expected:
            message += f" (expected {expected})"
        if remedy:
            message += f". {remedy[0].upper()}{remedy[1:]}"
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, str, str, str]]:
        """Rebuild from the four parts, so that errors survive being sent between processes."""
        return type(self), (self.where, self.found, self.expected, self.remedy)


class InputError(MedsegError):
    """A file or value given by the user cannot be used."""


class UnreadableFile(InputError):
    """A file is damaged, truncated, empty or of no known format."""


class GeometryMismatch(InputError):
    """Two grids that must be the same differ in shape or affine."""


class IncompleteSeries(InputError):
    """An image series has gaps, repeated slices or mixed orientations."""


class DatasetError(MedsegError):
    """A dataset cannot be used as it is; the message lists every bad case."""


class PlanError(MedsegError):
    """A plan field has an impossible value."""


class TrainingError(MedsegError):
    """Training cannot go on (the loss is not finite, or there is nothing to learn)."""


class PackageError(MedsegError):
    """A model package is incomplete, was altered, or has another schema version."""
