"""Records: small frozen values kept as JSON, and the atomic writing of any file.

A record refuses unknown keys and wrong types, knows its digest, and is written so that a reader sees the old file or
the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.errors import InputError, MedsegError, PlanError

TEMPORARY_PREFIX = ".medseg-tmp-"


class Record(BaseModel):
    """A frozen value with a digest that can be saved as JSON.

    A record that is saved on its own carries ``schema_version`` in the file; a file of another version is refused.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    schema_version: ClassVar[int] = 1

    def digest(self) -> str:
        """SHA-256 (hex) of the record's canonical JSON: equal records, equal digests."""
        return digest_of(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Write the record as indented JSON, atomically."""
        write_text(path, self.as_json())

    def as_json(self) -> str:
        """The text that ``save`` writes."""
        body = {"schema_version": self.schema_version, **self.model_dump(mode="json")}
        return json.dumps(body, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record.

        Raises:
            InputError: the file is missing, is no JSON, has another schema version, an unknown key or a wrong type.
        """
        body = read_json(path)
        version = body.pop("schema_version", None)
        if version != cls.schema_version:
            raise InputError(
                path,
                f"{cls.__name__} has schema version {version}",
                f"{cls.schema_version}",
                "make the file again with this version of medseg",
            )
        return cls.checked(body, path)

    @classmethod
    def checked(cls, body: dict[str, Any], where: object, error: type[MedsegError] = InputError) -> Self:
        """Build a record from plain data; ``error`` names ``where`` and every faulty field otherwise."""
        try:
            return cls.model_validate(body)
        except ValidationError as failure:
            raise error(where, _explain(failure, cls)) from None

    def override(self, settings: Iterable[str], prefix: str = "plan") -> Self:
        """A copy with fields replaced by ``prefix.field.field=JSON`` settings.

        Values are JSON; a bare word is taken as a string. Tuple items are addressed by their index. ``prefix`` is the
        word that every setting starts with.

        Raises:
            PlanError: no ``=``, an unknown field (the known ones are listed), or a value of the wrong type.
        """
        body = self.model_dump(mode="json")
        names = []
        for setting in settings:
            name, separator, text = setting.partition("=")
            head, _, path = name.strip().partition(".")
            if not separator or head != prefix or not path:
                raise PlanError(f"--set {setting}", "not a setting", f"{prefix}.FIELD=VALUE")
            _replace(body, [prefix, *path.split(".")], _parse_value(text.strip()), setting)
            names.append(setting)
        return type(self).checked(body, f"--set {' '.join(names)}", PlanError)


def digest_of(body: Any) -> str:
    """SHA-256 (hex) of plain JSON data, independent of key order."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes; of a folder, of the names and contents of all files in it."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest_of([[file.relative_to(path).as_posix(), digest_file(file)] for file in files])
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds something other than an object.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise InputError(path, f"cannot be read: {failure.strerror}", "a JSON file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as failure:
        raise InputError(path, f"is no JSON: {failure}", "a JSON object") from None
    if not isinstance(body, dict):
        raise InputError(path, f"holds a JSON {type(body).__name__}", "a JSON object")
    return body


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and vanishes when it does not.

    The temporary file keeps the name's ending (writers choose the format by it; 50 characters of at most 4 bytes stay
    below the 255 bytes that a file name may have). It is synced to disk before the
    rename and the folder after it, so that a crash leaves the old file or the new one.

    Raises:
        OSError: it cannot be written, with the name of ``path``.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}-{path.name[-50:]}")
    with failures_named(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def failures_named(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """OSErrors of writing ``path`` carry its name: those without any (of a full disk), or with its temporary one."""
    try:
        yield
    except OSError as failure:
        known = failure.filename not in (None, str(temporary), temporary)
        if failure.errno is None or known:
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from failure


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with the line ends as given; what is no text in a file name is escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, body: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    write_text(path, json.dumps(body, indent=2) + "\n")


def remove_leftovers(folder: Path) -> int:
    """Delete the temporary files that a killed run left under ``folder``; how many there were."""
    leftovers = [path for path in folder.rglob(f"{TEMPORARY_PREFIX}*") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder, and needs no sync of it
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _replace(body: Any, path: list[str], value: Any, setting: str) -> None:
    for depth, name in enumerate(path[1:], start=1):
        key: Any = int(name) if isinstance(body, list) and name.isdigit() else name
        known = list(body) if isinstance(body, dict) else [str(i) for i in range(len(body))] if _is_list(body) else []
        if str(key) not in known:
            where = ".".join(path[:depth])
            raise PlanError(
                f"--set {setting}", f"{where} has no field {name!r}", f"one of {', '.join(known) or 'nothing'}"
            )
        if depth == len(path) - 1:
            body[key] = value
        else:
            body = body[key]


def _is_list(body: Any) -> bool:
    return isinstance(body, list)


def _explain(failure: ValidationError, record: type[Record]) -> str:
    parts = []
    for item in failure.errors(include_url=False):
        field = ".".join(str(part) for part in item["loc"]) or record.__name__
        parts.append(f"{field}: {item['msg']} (found {str(item.get('input'))[:60]!r})")
    return "; ".join(parts)
