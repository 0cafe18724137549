"""Writes mosel/v1 from protos/mosel/v1, or proves with --check that it is current.

The generator is pinned to grpcio-tools 1.76, whose code loads on protobuf 6.31.1 and everything up to 7.x; the code of
newer generators refuses the older runtimes.
"""

import argparse
import sys
import sysconfig
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("mosel", "v1")


def generate(out: Path) -> None:
    """Writes messages, gRPC stubs and their types below `out`.

    Raises:
        SystemExit: a proto file is wrong; protoc has said where.
    """
    plugins = Path(sysconfig.get_path("scripts"))
    protos = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos" / PACKAGE).glob("*.proto"))
    command = [
        "protoc",
        f"--proto_path={ROOT / 'protos'}",
        f"--proto_path={resources.files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python")),
        *(f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")),
        *protos,
    ]
    if protoc.main(command) != 0:
        raise SystemExit("error: protoc refused a file in protos/")


def generated_files(folder: Path) -> dict[str, str]:
    """The generated files in `folder`, name to text."""
    return {path.name: path.read_text() for path in sorted(folder.glob("*_pb2*.py*"))}


def differences() -> list[str]:
    """One line for each file in mosel/v1 that is not what the protos give now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = generated_files(Path(folder, PACKAGE))
    committed = generated_files(ROOT / PACKAGE)
    changed = [name for name in sorted(fresh.keys() | committed.keys()) if fresh.get(name) != committed.get(name)]
    return [f"{PACKAGE / name}: {'out of date' if name in fresh else 'has no proto'}" for name in changed]


def main() -> None:
    """Generates, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where mosel/v1 is not current")
    if parser.parse_args().check:
        if found := differences():
            sys.exit("\n".join([*found, "error: run `make protos`"]))
        return
    for name in generated_files(ROOT / PACKAGE):
        (ROOT / PACKAGE / name).unlink()
    generate(ROOT)


if __name__ == "__main__":
    main()
