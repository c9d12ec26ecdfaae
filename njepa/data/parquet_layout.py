"""Which columns of Parquet files hold images and labels: Hugging Face's image layout.

The image is ``struct<bytes: binary, path: string>`` (or plain binary), the label an integer whose
class names stand in the schema's metadata, under the key ``huggingface``. pyarrow is imported where
a Parquet file is read, because nothing else needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from njepa.data.errors import SourceError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_EXPECTED = (
    "expected Hugging Face's image layout: a column 'image' (or 'img') of struct<bytes: binary, "
    "path: string> or binary, and for labels an integer or string column 'label' (or 'labels', "
    "'fine_label')"
)


@dataclass(frozen=True)
class Layout:
    """The columns of a file that are read."""

    image: str
    nested: bool
    """The encoded bytes are the field ``bytes`` of the image column."""
    label: str | None
    classes: tuple[str, ...] | None
    """Names of the classes 0, 1, ...; None: the label column holds the class itself."""

    @property
    def leaf(self) -> str:
        """The image column as pyarrow selects it."""
        return f"{self.image}.bytes" if self.nested else self.image

    def name_of(self, label: Any) -> str | None:
        """Class name of a value of the label column; None: no label (null, or -1).

        Raises:
            ValueError: a number without a name.
        """
        if label is None or label == -1:
            return None
        if self.classes is None:
            return str(label)
        if not 0 <= label < len(self.classes):
            raise ValueError(
                f"label {label}, but the file's metadata names the {len(self.classes)} classes 0 "
                f"to {len(self.classes) - 1}"
            )
        return self.classes[int(label)]


def require_pyarrow(path: Path) -> None:
    """Raises ``SourceError`` where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise SourceError(
            f"data: {path} is Parquet, which pyarrow reads, and pyarrow is not installed; run: "
            f"pip install 'njepa[parquet]'"
        )


def pyarrow(module: str = "") -> Any:
    """pyarrow, or a module of it; untyped."""
    return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")


def read_footer(path: Path) -> tuple[Any, Layout]:
    """The metadata of a file (``pyarrow.parquet.FileMetaData``) and its layout.

    Raises:
        SourceError: not Parquet, damaged, or without a usable image column.
    """
    try:
        metadata = pyarrow("parquet").read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except Exception as error:  # a damaged footer makes pyarrow raise almost anything
        raise SourceError(
            f"data: {path} cannot be read as a Parquet file ({_short(error)}); it is damaged or "
            f"was cut short: copy it again"
        ) from None
    return metadata, _layout(path, schema)


def _layout(path: Path, schema: Any) -> Layout:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise SourceError(
            f"data: no image column in {path}; got {_columns(schema) or 'no column'}; {_EXPECTED}"
        )
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    return Layout(
        image,
        _is_nested(path, schema, image),
        label,
        None if label is None else _classes(path, schema, label),
    )


def _is_nested(path: Path, schema: Any, image: str) -> bool:
    types = pyarrow("types")

    def binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    kind = schema.field(image).type
    if binary(kind):
        return False
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and binary(kind["bytes"].type):
        return True
    raise SourceError(
        f"data: the column {image!r} of {path} is {kind}, no encoded images; {_EXPECTED}"
    )


def _classes(path: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    types, kind = pyarrow("types"), schema.field(label).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind):
        return None
    if not types.is_integer(kind):
        raise SourceError(
            f"data: the label column {label!r} of {path} is {kind}, expected integers or strings; "
            f"leave the column out if it is no class"
        )
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features[label]["names"]]
    except (TypeError, LookupError, ValueError, RecursionError):  # other metadata, or none
        return None
    # Two classes of ImageNet are called "crane"; they stay apart.
    twice = {name for name, count in Counter(names).items() if count > 1}
    return tuple(f"{name} ({k})" if name in twice else name for k, name in enumerate(names))


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in list(schema)[:8])


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
