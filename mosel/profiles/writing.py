"""How files of measurements are written."""

import tempfile
from pathlib import Path

from pydantic import BaseModel


def write_whole(content: BaseModel, file: Path) -> None:
    """Writes a file, whole or not at all, readable by this user alone; missing folders are made.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=file.parent) as scratch:
        partial = Path(scratch) / file.name
        partial.touch(mode=0o600)
        partial.write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
