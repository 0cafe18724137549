"""What `model.toml` says of a model."""

from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Predicate
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs, InitErrorDetails, PydanticCustomError

from mosel.tensors import DTYPES
from mosel.validation import UNKNOWN_KEY, expected

_FORBID = ConfigDict(extra="forbid")


def _is_code_path(text: str) -> bool:
    module, _, attribute = text.partition(":")
    return module.isidentifier() and attribute.isidentifier()


def _some(tables: object) -> object:
    if not isinstance(tables, dict) or not tables:
        raise ValueError("expected at least one table of a modality")
    return tables


Text = Annotated[str, Field(strict=True), expected("a string")]
Texts = Annotated[tuple[Text, ...], expected("a list of strings")]
Flag = Annotated[bool, Field(strict=True), expected("true or false")]
Number = Annotated[float, Field(strict=True), expected("a number")]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), expected("a number above 0")]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1), expected("a number from 0 to 1")]
Identifier = Annotated[Text, Predicate(str.isidentifier), expected("letters, digits and _")]
ModalityName = Annotated[
    Identifier, Predicate(lambda name: name != "fusion"), expected("letters, digits and _, and not 'fusion'")
]
CodePath = Annotated[Text, Predicate(_is_code_path), expected("'module:Class'")]
Dtype = Annotated[Text, Predicate(DTYPES.__contains__), expected(f"one of {', '.join(DTYPES)}")]
Shape = Annotated[
    tuple[Annotated[int, Field(strict=True, gt=0)], ...], expected("a list of positive integers, such as [28, 28]")
]


@dataclass(frozen=True, config=_FORBID)
class _Table:
    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        """Says of an unknown key which ones there are, and has a missing one told with what was expected of it."""
        if isinstance(content, ArgsKwargs):
            return content
        if not isinstance(content, dict):
            raise ValueError("expected a table")
        declared: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined] # given by pydantic
        fields = {field.alias or name: field for name, field in declared.items()}
        for key in sorted(content.keys() - fields.keys()):
            kind = PydanticCustomError(UNKNOWN_KEY, "expected one of: {known}", {"known": ", ".join(sorted(fields))})
            wrong = InitErrorDetails(type=kind, loc=(key,), input=content[key])
            raise ValidationError.from_exception_data(cls.__name__, [wrong])
        return {key: None for key, field in fields.items() if field.is_required()} | content


@dataclass(frozen=True, config=_FORBID)
class ModalitySpec(_Table):
    """One named input.

    Attributes:
        dtype: name of the payload's data type, `FP32`.
        shape: payload shape of one item.
        encoder: `module:Class` of the encoder network.
        embedding: embedding shape of one item, FP32.
    """

    dtype: Dtype
    shape: Shape
    encoder: CodePath
    embedding: Shape


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class OutputSpec(_Table):
    """What the fusion network returns, per item; `labels` name the last axis."""

    name: Text = "output"
    dtype: Dtype = "FP32"
    shape: Shape
    labels: Texts = ()


@dataclass(frozen=True, config=_FORBID)
class Fusion(_Table):
    """The network that all embeddings meet in."""

    path: CodePath = Field(alias="class")


@dataclass(frozen=True, config=_FORBID)
class Samples(_Table):
    """Modules that know the model's recordings."""

    module: Text
    sources: Text = ""


@dataclass(frozen=True, config=_FORBID)
class Train(_Table):
    """The module that trains the model."""

    module: Text


@dataclass(frozen=True, config=_FORBID, kw_only=True)
class Manifest(_Table):
    """A whole `model.toml`; `weights` and `accuracy` are paths in its folder."""

    name: Identifier
    version: Text
    description: Text = ""
    metric: Text = "accuracy"
    modalities: Annotated[Mapping[ModalityName, ModalitySpec], BeforeValidator(_some)]
    fusion: Fusion
    output: OutputSpec
    weights: Text | None = None
    accuracy: Text = "accuracy.json"
    default_min_accuracy: Fraction | None = None
    max_accuracy_loss: Fraction | None = None
    samples: Samples | None = None
    train: Train | None = None
    random_weights: Flag = False
    serve_by_default: Flag = True
    optimise: Flag = True
    tolerance: Positive = 1e-4
    parameters: dict[str, Number] = Field(default_factory=dict)


MANIFEST = TypeAdapter(Manifest)
