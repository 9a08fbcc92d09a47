"""A stand-in for Hugging Face's `datasets.Dataset`; not a test."""


class ColumnDataset:
    """Columns in memory, read as by `datasets.Dataset`: rows are dictionaries, batches are read by `__getitems__`.

    Args:
        columns: Values by the name of the column.
        convert: Converts values that are lists, as `datasets.Dataset.with_format` does.
    """

    def __init__(self, columns, convert=list):
        self.columns, self.convert = columns, convert

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        if isinstance(key, int):
            return {name: self._converted(values[key]) for name, values in self.columns.items()}
        return {name: [self._converted(values[index]) for index in key] for name, values in self.columns.items()}

    def __getitems__(self, indices):
        batch = self[indices]
        return [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]

    def _converted(self, value):
        return self.convert(value) if isinstance(value, list) else value
