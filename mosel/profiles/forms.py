"""In which form each network was fastest on this hardware: small files beside the profiles."""

import hashlib
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from mosel.packages.model_package import ModelPackage
from mosel.profiles.hardware import Hardware, this_software
from mosel.profiles.writing import write_whole
from mosel.validation import explain

_FOLDER = "forms"

log = logging.getLogger(__name__)


class Choice(BaseModel):
    """A form that was chosen, and what the choice holds for: it is passed over where anything of that is different.

    Attributes:
        model: whose network.
        code: digest of the package without its weights, which time does not depend on.
        lane: the network: a modality, or `fusion`.
        hardware: what it was timed on.
        torch: the version.
        tolerance: that of the package.
        form: the fastest.
        speedup: how many times as fast as the network as it is.
        refused: why other forms cannot be used, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    code: str
    lane: str
    hardware: Hardware
    torch: str
    tolerance: float
    form: str
    speedup: float
    refused: dict[str, str] = {}

    def holds_for(self, package: ModelPackage) -> bool:
        """Whether these networks are served in this form by the software that is installed."""
        of_package = (package.name, package.code, package.tolerance, package.optimise)
        return of_package == (self.model, self.code, self.tolerance, True) and self.torch == this_software().torch


def share_forms(profiles_dir: Path, other: Path) -> None:
    """Has another folder of profiles hold the choices of this one."""
    (profiles_dir / _FOLDER).mkdir(parents=True, exist_ok=True)
    (other / _FOLDER).symlink_to((profiles_dir / _FOLDER).absolute())


def kept_forms(package: ModelPackage, hardware: Hardware, profiles_dir: Path) -> dict[str, str]:
    """The forms that were chosen for the networks of a package on this hardware, by lane, as far as they are known."""
    forms = {}
    for file in sorted((profiles_dir / _FOLDER).glob(f"{_stem(package)}-*.json")):
        choice = _read(file)
        if choice is None or not choice.holds_for(package):
            continue
        # Services may compute on several devices; each chooses for its own.
        if choice.hardware in (hardware, hardware.model_copy(update={"device": choice.hardware.device})):
            forms[f"{choice.lane} on {choice.hardware.device}"] = choice.form
    return forms


def kept_choice(package: ModelPackage, lane: str, hardware: Hardware, profiles_dir: Path) -> Choice | None:
    """What was chosen for a network, None if nothing that holds is known."""
    choice = _read(_file(package, lane, hardware, profiles_dir))
    if choice is None or not choice.holds_for(package) or (choice.lane, choice.hardware) != (lane, hardware):
        return None
    return choice


def keep_choice(choice: Choice, package: ModelPackage, profiles_dir: Path) -> None:
    """Keeps a choice, whole or not at all; where that is impossible it is made again at the next start."""
    file = _file(package, choice.lane, choice.hardware, profiles_dir)
    try:
        write_whole(choice, file)
    except OSError as error:
        log.warning("form of a network not kept", extra={"file": str(file), "reason": error.strerror})


def _read(file: Path) -> Choice | None:
    try:
        return Choice.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = explain(error) if isinstance(error, ValidationError) else str(error)
        log.warning("kept form of a network ignored", extra={"file": str(file), "reason": reason})
        return None


def _stem(package: ModelPackage) -> str:
    return f"{package.name}-{package.code[:12]}"


def _file(package: ModelPackage, lane: str, hardware: Hardware, profiles_dir: Path) -> Path:
    key = hashlib.sha256(hardware.model_dump_json().encode()).hexdigest()[:12]
    return profiles_dir / _FOLDER / f"{_stem(package)}-{lane}-{key}.json"
