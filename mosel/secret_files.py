"""Files that only this user may read: private keys, and the hashes of tokens."""

import os
from pathlib import Path

from mosel.errors import ConfigError


def read_file(path: Path, setting: str, *, secret: bool = False) -> bytes:
    """What a file holds that a setting names.

    Args:
        path: the file.
        setting: the setting or flag that names it, for messages.
        secret: whether nobody else may read it.

    Raises:
        ConfigError: it cannot be read, or others may read a secret.
    """
    try:
        with path.open("rb") as file:
            if secret and os.name == "posix":
                _refuse_readable_by_others(os.fstat(file.fileno()), path, setting)
            return file.read()
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {error.strerror or error}") from None


def _refuse_readable_by_others(file: os.stat_result, path: Path, setting: str) -> None:
    # A file of root that is given to this process through its group, as containers do, is all right.
    forbidden = 0o077 if file.st_uid == os.geteuid() else 0o037
    if file.st_mode & forbidden:
        raise ConfigError(
            f"{setting}: {path} has mode {file.st_mode & 0o777:04o}, so that others may use it; "
            f"expected a file for this user alone: chmod 600 {path}"
        )
