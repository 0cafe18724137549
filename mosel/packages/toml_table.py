"""A TOML table that names file and key in every complaint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mosel.errors import PackageError
from mosel.tensors import DTYPES


class Table:
    """A TOML table that knows which keys were asked for. Every method raises a PackageError that names file and key.

    Args:
        file: where it is.
        path: in front of its keys, `output.`; empty for the root.
        content: as parsed.
    """

    def __init__(self, file: Path, path: str, content: Mapping[str, Any]) -> None:
        self._file, self._path, self._content = file, path, content
        self._asked: set[str] = set()

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str, default: Any) -> Any:
        self._asked.add(key)
        value = self._content.get(key, default)
        if value is None or isinstance(value, bool) or not isinstance(value, kind):
            found = f"holds {value!r}" if key in self._content else "is missing"
            raise PackageError(f"{self._file}: key '{self._path}{key}' {found}; expected {expected}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return str(self._get(key, str, "a string", default))

    def identifier(self, key: str) -> str:
        """A string that can be a name in code."""
        value = self.text(key)
        if not value.isidentifier():
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds '{value}'; expected letters, digits and _")
        return value

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """Several strings."""
        values = tuple(self._get(key, (list, tuple), "a list of strings", default))
        if not all(isinstance(value, str) for value in values):
            raise PackageError(
                f"{self._file}: key '{self._path}{key}' holds {list(values)!r}; expected a list of strings"
            )
        return values

    def fraction(self, key: str) -> float | None:
        """A number from 0 to 1, None if it is not there."""
        if key not in self._content:
            return None
        value = float(self._get(key, (int, float), "a number from 0 to 1", None))
        if not 0 <= value <= 1:
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds {value}; expected a number from 0 to 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        self._asked.add(key)
        value = self._content.get(key, default)
        if not isinstance(value, bool):
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds {value!r}; expected true or false")
        return value

    def numbers(self) -> dict[str, float]:
        """Every key of the table, all of them numbers."""
        return {key: float(self._get(key, (int, float), "a number", None)) for key in self._content}

    def shape(self, key: str) -> tuple[int, ...]:
        """Positive integers."""
        expected = "a list of positive integers, such as [28, 28]"
        values = tuple(self._get(key, list, expected, None))
        if not all(type(value) is int and value > 0 for value in values):
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds {list(values)!r}; expected {expected}")
        return values

    def dtype(self, default: str | None = None) -> str:
        """The name of a data type."""
        name = self.text("dtype", default)
        if name not in DTYPES:
            raise PackageError(
                f"{self._file}: key '{self._path}dtype' holds '{name}'; expected one of {', '.join(DTYPES)}"
            )
        return name

    def code_path(self, key: str) -> str:
        """`module:Class`."""
        path = self.text(key)
        module, _, attribute = path.partition(":")
        if not (module.isidentifier() and attribute.isidentifier()):
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds '{path}'; expected 'module:Class'")
        return path

    def table(self, key: str) -> "Table":
        """A table inside this one."""
        return Table(self._file, f"{self._path}{key}.", self._get(key, dict, f"a table [{self._path}{key}]", None))

    def optional_table(self, key: str) -> "Table | None":
        """A table inside this one, None if it is not there."""
        return self.table(key) if key in self._content else None

    def tables(self, key: str) -> list[tuple[str, "Table"]]:
        """Named tables inside this one, at least one; the names are those of modalities."""
        outer = self.table(key)
        if not outer._content:
            raise PackageError(f"{self._file}: key '{key}' holds no modality; expected at least one [{key}.<name>]")
        for name in outer._content:
            if not name.isidentifier() or name == "fusion":
                raise PackageError(
                    f"{self._file}: modality name '{name}' in '{key}'; expected letters, digits and _, and not 'fusion'"
                )
        return [(name, outer.table(name)) for name in outer._content]

    def refuse_unknown(self) -> None:
        """Complains of a key that nobody asked for."""
        unknown = sorted(set(self._content) - self._asked)
        if unknown:
            known = ", ".join(sorted(self._asked))
            raise PackageError(f"{self._file}: key '{self._path}{unknown[0]}' is unknown; expected one of: {known}")
