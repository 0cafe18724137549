"""What pydantic finds wrong with a file or the settings, in one line of ours."""

from typing import Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator

# The type of errors that say which keys there are; see `mosel.packages.manifest`.
UNKNOWN_KEY = "unknown_key"
_PREFIXES = (("Value error, ", ""), ("Input should be ", "expected "))


def expected(text: str) -> WrapValidator:
    """Annotates a type: a wrong value is reported whole, with these words for what was expected."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"expected {text}") from None

    return WrapValidator(check)


def explain(error: ValidationError, kind: str = "key") -> str:
    """The first thing that is wrong: `key 'output.shape' holds [0]; expected a list of positive integers`.

    Args:
        error: what pydantic raised.
        kind: what the names are names of.
    """
    first = error.errors(include_url=False)[0]
    *outer, last = first["loc"] or ("",)
    expectation = first["msg"]
    for prefix, ours in _PREFIXES:
        if expectation.startswith(prefix):
            expectation = ours + expectation.removeprefix(prefix)
    if not first["loc"]:
        return expectation
    if last == "[key]":
        return f"name {first['input']!r} in '{'.'.join(map(str, outer[:-1]))}'; {expectation}"
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{kind} '{name}' is unknown"
    if first["type"] == UNKNOWN_KEY:
        return f"{kind} '{name}' is unknown; {expectation}"
    if first["type"] == "missing":
        return f"{kind} '{name}' is missing"
    # TOML has no null: there it stands for a key that is not there.
    found = "is missing" if first["input"] is None else f"holds {first['input']!r}"
    return f"{kind} '{name}' {found}; {expectation}"
