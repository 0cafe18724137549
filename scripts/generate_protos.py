"""Writes what is generated from protos/, or proves with --check that it is current.

`mosel.v1` becomes Python modules in mosel/v1. The Open Inference Protocol becomes a descriptor set, which the gateway
loads into a pool of its own.

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
OPEN_INFERENCE = Path("inference", "open_inference.proto")
DESCRIPTOR_SET = Path("gateway", "inference", "open_inference.binpb")


def generate(out: Path) -> None:
    """Writes messages, gRPC stubs and their types, and the descriptor set, below `out`.

    Raises:
        SystemExit: a proto file is wrong; protoc has said where.
    """
    plugins = Path(sysconfig.get_path("scripts"))
    (out / DESCRIPTOR_SET).parent.mkdir(parents=True, exist_ok=True)
    _compile(
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python")),
        *(f"--{kind}_out=quiet:{out}" for kind in ("mypy", "mypy_grpc")),
        *sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos" / PACKAGE).glob("*.proto")),
    )
    _compile(f"--descriptor_set_out={out / DESCRIPTOR_SET}", str(OPEN_INFERENCE))


def _compile(*arguments: str) -> None:
    paths = (ROOT / "protos", resources.files("grpc_tools") / "_proto")
    if protoc.main(["protoc", *(f"--proto_path={path}" for path in paths), *arguments]) != 0:
        raise SystemExit("error: protoc refused a file in protos/")


def generated_files(root: Path) -> dict[Path, bytes]:
    """The generated files below `root`, relative path to content."""
    files = [*(root / PACKAGE).glob("*_pb2*.py*"), *(root / DESCRIPTOR_SET.parent).glob(f"*{DESCRIPTOR_SET.suffix}")]
    return {path.relative_to(root): path.read_bytes() for path in sorted(files)}


def differences() -> list[str]:
    """One line for each generated file that is not what the protos give now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = generated_files(Path(folder))
    committed = generated_files(ROOT)
    changed = [path for path in sorted(fresh.keys() | committed.keys()) if fresh.get(path) != committed.get(path)]
    return [f"{path}: {'out of date' if path in fresh else 'has no proto'}" for path in changed]


def main() -> None:
    """Generates, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is not current")
    if parser.parse_args().check:
        if found := differences():
            sys.exit("\n".join([*found, "error: run `make protos`"]))
        return
    for path in generated_files(ROOT):
        (ROOT / path).unlink()
    generate(ROOT)


if __name__ == "__main__":
    main()
