"""Tokenizing text into a token file: `homebrew prepare`, and what nanoGPT's `prepare.py` does."""

import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from command_line import run_script

# What only one of the two needs is imported where it is used, so that it does not count for the other.


@dataclass
class Options:
    """Compare the throughput and the peak memory of all processes, and the token ids."""

    megabytes: float = 1000
    """Size of the text."""
    workers: int = 2
    """Number of processes."""
    json: Path | None = None
    """JSON file for tables and raw times."""
    nanogpt: tuple[Path, Path] | None = None
    """Internal: tokenize the first file into the second as nanoGPT does, in this process."""


def main(options: Options) -> None:
    if options.nanogpt is not None:
        prepare_as_nanogpt(*options.nanogpt, options.workers)
        return
    from harness import Report, format_number
    from implementations import temporary_folder

    from homebrew.data.gpt2_vocabulary import GPT2_URL, gpt2_vocabulary_files
    from homebrew.data.token_file import TokenFile

    folder = temporary_folder()
    for name, content in gpt2_vocabulary_files().items():  # tiktoken's cache, so that it does not download them
        (folder / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()).write_bytes(content)  # noqa: S324
    os.environ |= {"TIKTOKEN_CACHE_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    text = folder / "text.jsonl"
    num_bytes = write_documents(text, int(1e6 * options.megabytes))
    workers = ["--workers", str(options.workers)]
    ours = ["-m", "homebrew", "prepare", str(text), "--output", str(folder / "homebrew.npy"), *workers]
    theirs = [__file__, "--nanogpt", str(text), str(folder / "nanogpt.bin"), *workers]
    results = {"homebrew": measure(ours), "nanoGPT's way: tiktoken in datasets.map": measure(theirs)}
    ids, other = TokenFile(folder / "homebrew.npy").ids, np.memmap(folder / "nanogpt.bin", np.uint16, mode="r")
    report = Report(options.json)
    # nanoGPT has the end-of-text token after the last document, too.
    report.metadata["equal ids"] = np.array_equal(ids, other[:-1])
    rows = []
    for name, (seconds, cpu, peak_bytes) in results.items():
        row = {"implementation": name, "seconds": format_number(seconds)}
        row |= {"MB/s": format_number(num_bytes / 1e6 / seconds)}
        row |= {"speedup": f"{results['homebrew'][0] / seconds:.3f} ×", "CPU seconds": format_number(cpu)}
        rows.append(row | {"peak memory, MB": format_number(peak_bytes / 1e6)})
    report.add(f"{num_bytes / 1e6:,.0f} MB of text, {len(ids):,} tokens, {options.workers} processes", rows)
    report.finish()


def write_documents(path: Path, num_bytes: int) -> int:
    """Write documents of lines from the source code of the installed packages, and return the size of their texts."""
    generator, lines, written = random.Random(0), list[str](), 0  # noqa: S311
    files = sorted(Path(np.__file__).parents[1].rglob("*.py"))
    generator.shuffle(files)
    while files and len(lines) < num_bytes // 40:
        lines += files.pop().read_text(encoding="utf-8", errors="ignore").splitlines()
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            starts = [generator.randrange(len(lines)) for _ in range(generator.randint(2, 30))]
            text = "\n".join(line for start in starts for line in lines[start : start + 3])
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    return written


def prepare_as_nanogpt(text: Path, output: Path, workers: int) -> None:
    """Tokenize as nanoGPT's `data/openwebtext/prepare.py` does, with fewer batches if there are few documents."""
    import tiktoken
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    encoding = tiktoken.get_encoding("gpt2")

    def process(example: dict[str, str]) -> dict[str, object]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}

    cache = tempfile.mkdtemp(dir=text.parent)
    dataset = load_dataset("json", data_files=str(text), split="train", cache_dir=cache)
    tokenized = dataset.map(process, remove_columns=["text"], num_proc=workers)
    array = np.memmap(output, np.uint16, mode="w+", shape=(sum(tokenized["len"]),))
    position, batches = 0, min(1024, len(tokenized) // 500 + 1)
    for i in range(batches):
        batch = tokenized.shard(num_shards=batches, index=i, contiguous=True).with_format("numpy")
        ids = np.concatenate(batch["ids"])
        array[position : position + len(ids)] = ids
        position += len(ids)
    array.flush()


def measure(arguments: list[str]) -> tuple[float, float, int]:
    """Run a Python process. Return its seconds, and CPU seconds and peak memory in bytes of it and its children."""
    start, before, peak = time.perf_counter(), os.times(), 0
    process = psutil.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes = [process, *process.children(recursive=True)]
            # In a proportional set size, a page that n processes share counts 1/n. After a fork, most are shared.
            peak = max(peak, sum(each.memory_full_info().pss for each in processes))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{arguments} failed with exit code {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu, peak


if __name__ == "__main__":
    run_script(main, Options)
