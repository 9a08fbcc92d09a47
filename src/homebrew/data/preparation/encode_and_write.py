"""Encodes the parts of an input and writes the token files, except what an earlier run has done."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from homebrew.data.preparation.encode_part import EncodeSettings, Split
from homebrew.data.preparation.joined_parts import JoinedParts
from homebrew.data.preparation.plan import Part
from homebrew.data.preparation.shard_writer import ShardWriter
from homebrew.data.preparation.state import PrepareState, RunPlan
from homebrew.data.preparation.workers import encoding
from homebrew.data.tokenizer import Tokenizer

Writers = Mapping[Split, ShardWriter]


def encode_and_write(
    state: PrepareState,
    plan: RunPlan,
    parts: Sequence[Part],
    settings: EncodeSettings,
    writers: Writers,
    *,
    tokenizer: Tokenizer,
    source: str,
    workers: int,
    progress: bool,
) -> JoinedParts:
    """Encode the parts that are missing, and write the token files that are missing.

    Args:
        state: Folder of the encoded parts, locked by this process.
        plan: Options and inputs that the token files depend on.
        parts: All parts of the input.
        settings: How to encode them.
        writers: The writer of each split's token files.
        tokenizer: Tokenizer that makes the ids.
        source: Description of the input, for messages.
        workers: Number of processes.
        progress: Whether to show the progress, if standard error is a terminal.

    Returns:
        The parts. Their ids have been removed, and only their counts are left.

    Raises:
        DataError: A file cannot be read or written, there is no text, or the earlier run has other options.
    """
    num_unchanged = state.num_unchanged(plan)
    state.remove_parts(num_unchanged)
    joined = JoinedParts(state, len(parts), writers, tokenizer, source)
    _keep_shards(state, plan, writers, joined, is_changed=num_unchanged < len(parts))
    has_shards = state.has_shards()
    num_shards = {split: writer.num_complete() if has_shards else 0 for split, writer in writers.items()}
    starts = {split: num_shards[split] * (writer.shard_tokens or 0) for split, writer in writers.items()}
    missing = {i: parts[i] for i in joined.incomplete(starts)}
    with (
        _show_progress(parts, missing, is_shown=progress) as on_part,
        encoding(missing, settings, workers, on_part) as results,
    ):
        for split, writer in writers.items():
            ids = joined.read(split, starts[split], results)
            for _ in writer.write(ids, num_shards[split], partial(_replace_shards, state, plan, writers)):
                if writer.shard_tokens is not None:
                    joined.remove_read(split)
    state.remove_parts()
    return joined


def _keep_shards(
    state: PrepareState, plan: RunPlan, writers: Writers, joined: JoinedParts, *, is_changed: bool
) -> None:
    """Remove the earlier run's shards that contain changed parts, and write the plan of this run."""
    has_shards = state.has_shards()
    for split, writer in writers.items():
        writer.remove_leftovers()
        if has_shards and is_changed:  # validation shards are written after all training shards
            writer.remove_shards(joined.num_tokens(split) if split == "train" else 0)
    if is_changed:
        state.write_plan(plan, has_shards=has_shards)


def _replace_shards(state: PrepareState, plan: RunPlan, writers: Writers) -> None:
    """Remove the shards of an earlier, completed run before the first shard of this run appears."""
    if not state.has_shards():
        for writer in writers.values():
            writer.remove_shards(0)
        state.write_plan(plan, has_shards=True)


@contextlib.contextmanager
def _show_progress(
    parts: Sequence[Part], missing: Mapping[int, Part], *, is_shown: bool
) -> Iterator[Callable[[Part], None]]:
    """Show a progress bar on standard error while the block runs, and yield a function to call after each part.

    Args:
        parts: All parts.
        missing: Parts that an earlier run has not encoded.
        is_shown: Whether to show the bar. Nothing is shown if standard error is not a terminal.
    """
    if not (is_shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("Tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    num_bytes, num_missing = (sum(part.num_bytes for part in each) for each in (parts, missing.values()))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=num_bytes, completed=num_bytes - num_missing)
        yield lambda part: bar.advance(task, part.num_bytes)
