"""`DictDataset`: samples with labels, for which the user states whether they are shifted."""

from typing import Any

from torch.utils.data import Dataset

from homebrew.data.samples import Sample, as_sample
from homebrew.data.validation import check_map_style
from homebrew.errors import DataError


class DictDataset(Dataset[Sample]):
    """A dataset of dictionaries with `input_ids` and `labels`, such as one that was made for Transformers.

    A dictionary may also have `loss_mask`, which is 0 where `labels` is not a target, and `attention_mask`, which may
    only mark padding on the right.

    Args:
        dataset: Map-style dataset, such as a Hugging Face `datasets.Dataset`.
        labels_are_shifted: False if `labels[i]` belongs to `input_ids[i]`, as in Transformers; True if it is the token
            after `input_ids[i]`.

    Raises:
        DataError: An argument is not valid.
    """

    def __init__(self, dataset: Dataset[Any], *, labels_are_shifted: bool) -> None:
        check_map_style(dataset, "dataset")
        if not isinstance(labels_are_shifted, bool):
            raise DataError(f"labels_are_shifted is {labels_are_shifted!r:.100}. Use True or False.")
        self.dataset = dataset
        self.labels_are_shifted = labels_are_shifted

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        return as_sample(self.dataset[index], f"dataset[{index}]", labels_are_shifted=self.labels_are_shifted)
