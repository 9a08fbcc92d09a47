"""Reads the texts of a dataset of dictionaries."""

from collections.abc import Iterable, Mapping
from typing import Any

from homebrew.data.validation import check_map_style
from homebrew.errors import DataError


def column_of_texts(dataset: Any, column: str) -> list[str]:  # noqa: ANN401 - map-style or iterable
    """Return the text in each row of a dataset.

    Raises:
        DataError: A row is not a dictionary with a text under the key `column`.
    """
    rows: Iterable[Any] = dataset
    if isinstance(dataset, Mapping) or not isinstance(dataset, Iterable):
        check_map_style(dataset, "dataset")
        rows = (dataset[index] for index in range(len(dataset)))
    texts = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not isinstance(row.get(column), str):
            raise DataError(
                f"Row {index} of the dataset is {row!r:.300}, but must be a dictionary with a text under the key "
                f"{column!r}. Set text_column to the key of the text, and remove rows without text."
            )
        texts.append(row[column])
    return texts
