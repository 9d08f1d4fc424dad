"""From published data sets to one checked, indexed dataset.

Owns the pass over the sources: batches of records go to worker processes, what comes back is
appended in order, and a journal says how far everything is, so that a run that was interrupted goes
on where it stopped. Memory does not grow with the data. Knows nothing about what makes a record
good (`trainer.records`), where sources come from (`trainer.sources`), models or the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import msgspec
import numpy as np
from tqdm import tqdm

from trainer.dataset import (
    BLOB_NAME,
    COLUMNS,
    META_NAME,
    PIXELS_NAME,
    DatasetMeta,
    Measured,
    Source,
    StoredRecord,
    sample_messages,
    tokenizer_hash,
)
from trainer.json_stream import BEGINNING, Position, RawRecord, read_records
from trainer.prepare_report import Report, SourceReport, summarise, write_report
from trainer.records import Drop, ImageCheck, convert, fit, image_paths
from trainer.samples import count
from trainer.sources import SourceFiles
from w2c_tui.core.errors import ConfigError, PromptError, W2CError
from w2c_tui.core.files import write_atomically
from w2c_tui.core.image import ImageSpec
from w2c_tui.core.prompt import AnyTemplate

BATCH_RECORDS = 256
JOURNAL_EVERY_S = 2.0
WORK_NAME = "unfinished"
DROPS_NAME = "drops.jsonl"

ROW = np.dtype(
    [
        ("size", "<i4"),
        ("length", "<i4"),
        ("num_supervised", "<i4"),
        ("num_kept_supervised", "<i4"),
        ("num_images", "u1"),
        ("pixel_bytes", "<i4"),
        ("source", "u1"),
        ("id", "<u8"),
        ("content", "<u8"),
    ]
)
"""What is known of a record while preparing; `id` and `content` are hashes."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """What lengths are counted with, as given: everything a worker process needs."""

    tokenizer: Any
    tokenizer_name: str
    template: AnyTemplate
    tokens_per_image: int
    max_length: int

    @property
    def measured(self) -> Measured:
        return Measured(
            tokenizer=tokenizer_hash(self.tokenizer),
            tokenizer_name=self.tokenizer_name,
            template=self.template.name,
            image_seq_length=self.tokens_per_image,
            max_length=self.max_length,
        )


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to prepare, and how.

    `weights`: rows of a source per record of it, 0.5 is a seeded half and 2 is everything twice.
    `limits`: records of a source to read. `images`: how closely they are looked at. `pixels`: store
    every image as a vision tower with this preparation sees it. `max_drops`: share of a source's
    records that may be left out before that is an error.
    """

    sources: tuple[SourceFiles, ...]
    tokens: Tokens
    weights: Mapping[str, float] = {}
    limits: Mapping[str, int] = {}
    images: ImageCheck = "full"
    pixels: ImageSpec | None = None
    seed: int = 0
    workers: int = 1
    max_drops: float = 0.1


# --- In the worker processes ----------------------------------------------------------------------


class Batch(msgspec.Struct, frozen=True):
    """Neighbouring records of one file, as they were read."""

    source: int
    file: str
    images: str
    records: list[RawRecord]

    @property
    def after(self) -> Position:
        return self.records[-1].after


class Done(msgspec.Struct, frozen=True):
    """What became of a batch."""

    blob: bytes
    pixels: bytes
    rows: np.ndarray
    drops: list[dict[str, Any]]
    repairs: Counter[str]
    formats: Counter[str]


_worker: dict[str, Any] = {}


def _start_worker(tokens: Tokens, images: ImageCheck, pixels: ImageSpec | None) -> None:
    # One thread each: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # What is stored is decoded from end to end anyway.
    images = "header" if pixels is not None else images
    _worker.update(tokens=tokens, images=images, pixels=pixels)
    if multiprocessing.parent_process() is not None:
        # Ctrl-C reaches every process of the terminal; only the main one has something to save.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _process(batch: Batch) -> Done:
    tokens: Tokens = _worker["tokens"]
    images: ImageCheck = _worker["images"]
    spec: ImageSpec | None = _worker["pixels"]
    blobs: list[bytes] = []
    pixels: list[bytes] = []
    rows: list[tuple[int, ...]] = []
    drops: list[dict[str, Any]] = []
    repairs: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    stem = Path(batch.file).stem
    for raw in batch.records:
        made_id = f"{stem}-{raw.number}"
        record = convert(raw.data, made_id, batch.images, images, repairs, formats)
        fitted = b""
        if isinstance(record, StoredRecord) and record.images and spec is not None:
            found = fit(record, batch.images, spec)
            record = found if isinstance(found, Drop) else found.record
            fitted = b"" if isinstance(found, Drop) else found.pixels
        if isinstance(record, StoredRecord):
            try:
                counts = _counts(record, tokens)
            except PromptError as error:
                record = Drop(record.id, "template", error.message)
        if isinstance(record, Drop):
            drops.append(
                {
                    "file": batch.file,
                    "line": raw.line,
                    "record": raw.number,
                    "id": record.id,
                    "reason": record.reason,
                    "detail": record.detail,
                }
            )
            continue
        blob = msgspec.msgpack.encode(record)
        blobs.append(blob)
        pixels.append(fitted)
        rows.append((len(blob), *counts, len(fitted), *_hashes(batch, record, blob)))
    return Done(
        b"".join(blobs), b"".join(pixels), np.array(rows, dtype=ROW), drops, repairs, formats
    )


def _counts(record: StoredRecord, tokens: Tokens) -> tuple[int, int, int, int]:
    """Tokens, those under the loss, those of them that are kept, images."""
    counts = count(
        sample_messages(record, ""),
        tokens.template,
        tokens.tokenizer,
        tokens_per_image=tokens.tokens_per_image,
        max_length=tokens.max_length,
    )
    return (
        counts.num_tokens,
        counts.num_supervised,
        counts.num_kept_supervised,
        len(record.images),
    )


def _hashes(batch: Batch, record: StoredRecord, blob: bytes) -> tuple[int, int, int]:
    return batch.source, _hash64(record.id.encode()), _hash64(blob)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


# --- In the main process --------------------------------------------------------------------------


class Journal(msgspec.Struct, kw_only=True):
    """How far a run is. Everything in the files beyond these sizes is thrown away on going on."""

    settings: str
    file: int = 0
    position: Position = BEGINNING
    blob_bytes: int = 0
    pixel_bytes: int = 0
    num_rows: int = 0
    drop_bytes: int = 0
    chain: str = ""
    images: list[str] = []
    read: dict[str, int] = {}
    dropped: dict[str, dict[str, int]] = {}
    repaired: dict[str, dict[str, int]] = {}
    formats: dict[str, dict[str, int]] = {}


def prepare(job: Job, out: Path, *, overwrite: bool = False, progress: bool = True) -> Report:
    """Write the dataset of `job` into the folder `out`, or go on with what is there.

    Raises ConfigError for another dataset in `out`, sources that cannot be read, broken files and
    too many drops; what was done until then is kept and gone on with.
    """
    out = out.expanduser().absolute()
    if job.pixels is not None:
        job = msgspec.structs.replace(job, images="full")
    settings = _settings_key(job)
    work = out / WORK_NAME
    with _disk_errors(out):
        if overwrite:
            _clear(out)
        _refuse_foreign(out)
        work.mkdir(parents=True, exist_ok=True)
        journal = _read_journal(work / "journal.json", settings, out)
        if not journal.images:
            journal.images = [os.fspath(_images_folder(s, job.images)) for s in job.sources]
        _Run(job, out, journal, progress).read_everything()
        _check_drops(job, journal, out)
        meta, report = _finish(job, out, journal)
        write_report(out, report)
        write_atomically(
            out / META_NAME, msgspec.json.format(msgspec.json.encode(meta)).decode() + "\n"
        )
        shutil.rmtree(work)
    return report


def _settings_key(job: Job) -> str:
    """A hash of all that decides what is written, so that only the same run is gone on with."""
    sources = [
        [s.name, [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in s.files]]
        for s in job.sources
    ]
    given = [sources, job.tokens.measured, dict(job.limits), job.images, job.pixels]
    return hashlib.sha256(msgspec.json.encode(given)).hexdigest()


def _clear(out: Path) -> None:
    for name in (META_NAME, BLOB_NAME, PIXELS_NAME, DROPS_NAME, "report.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    for name in COLUMNS:
        (out / f"{name}.npy").unlink(missing_ok=True)
    if (out / WORK_NAME).is_dir():
        shutil.rmtree(out / WORK_NAME)


def _refuse_foreign(out: Path) -> None:
    if (out / META_NAME).is_file():
        raise ConfigError(
            f"{out} holds a finished dataset.",
            hint="Name another folder, or add --overwrite to prepare this one again.",
        )
    if out.exists() and any(out.iterdir()) and not (out / WORK_NAME).is_dir():
        raise ConfigError(f"{out} is not empty, and no dataset.", hint="Name another folder.")


def _read_journal(path: Path, settings: str, out: Path) -> Journal:
    try:
        journal = msgspec.json.decode(path.read_bytes(), type=Journal)
    except FileNotFoundError:
        return Journal(settings=settings)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.", hint="Start over with --overwrite."
        ) from error
    if journal.settings != settings:
        raise ConfigError(
            f"{out} holds an unfinished dataset of other sources or settings.",
            hint="Run the same command again to go on, or add --overwrite to start over.",
        )
    return journal


def _images_folder(source: SourceFiles, check: ImageCheck) -> Path:
    """The folder that the image paths of `source` start from, found by trying its first ones."""
    first = itertools.islice(_until_broken(read_records(source.files[0])), 2000)
    # A broken place is met again, with what comes before it kept.
    records = (each for each in first if isinstance(each, RawRecord))
    named = list(itertools.islice((p for raw in records for p in image_paths(raw.data)), 200))
    folder = source.folder_of(named)
    if folder is not None:
        return folder
    if named and check != "none":
        tried = ", ".join(map(str, source.image_folders)) or "no folder"
        home = source.how_to_fetch(os.path.dirname(named[0]))
        raise ConfigError(
            f"Source {source.name}: none of its first {len(named)} images exists, for example "
            f"{named[0]}; looked in {tried}.",
            hint=(f"Fetch them from {home}, or n" if home else "N")
            + f"ame their folder with --images {source.name}=FOLDER.",
        )
    return source.image_folders[0] if source.image_folders else source.files[0].parent


class _Run:
    """The pass over all files, with at most a few batches under way."""

    def __init__(self, job: Job, out: Path, journal: Journal, progress: bool) -> None:
        self._job = job
        self._out = out
        self._journal = journal
        self._files = [(at, file) for at, source in enumerate(job.sources) for file in source.files]
        self._blob = _opened_at(out / BLOB_NAME, journal.blob_bytes)
        self._pixels = _opened_at(out / PIXELS_NAME, journal.pixel_bytes)
        self._rows = _opened_at(out / WORK_NAME / "rows", journal.num_rows * ROW.itemsize)
        self._drops = _opened_at(out / DROPS_NAME, journal.drop_bytes)
        self._outputs = (self._blob, self._pixels, self._rows, self._drops)
        self._show = progress
        self._saved_at = monotonic()

    def read_everything(self) -> None:
        sizes = [file.stat().st_size for _, file in self._files]
        start = sum(sizes[: self._journal.file]) + self._journal.position.offset
        try:
            with (
                _pool(self._job) as submit,
                tqdm(
                    total=sum(sizes),
                    initial=start,
                    unit="B",
                    unit_scale=True,
                    disable=not self._show,
                    mininterval=0.5 if sys.stderr.isatty() else 15,
                ) as bar,
            ):
                began = monotonic()
                num_before = sum(self._journal.read.values())
                while self._journal.file < len(self._files):
                    for moved in self._read_file(submit):
                        bar.update(moved)
                        num = sum(self._journal.read.values()) - num_before
                        rate = num / max(1e-9, monotonic() - began)
                        bar.set_postfix_str(f"{rate:,.0f} records/s", refresh=False)
        except BrokenProcessPool as error:
            raise W2CError(
                "A worker process was killed, most likely for lack of memory.",
                hint="Run the same command with fewer --workers; it goes on where it stopped.",
            ) from error
        finally:
            try:
                # Also after a broken file: what was done is kept.
                self._save()
            finally:
                for file in self._outputs:
                    # On a full disk even closing fails, after the failure that counts.
                    with contextlib.suppress(OSError):
                        file.close()

    def _read_file(self, submit: Any) -> Iterator[int]:
        """One file to its end; yields how many bytes further it is after each batch."""
        journal = self._journal
        under_way: deque[tuple[Batch, Future[Done]]] = deque()
        broken: ConfigError | None = None
        size = self._files[journal.file][1].stat().st_size
        begun = journal.position.offset
        batches = self._batches()
        while True:
            while broken is None and len(under_way) < 3 * self._job.workers:
                try:
                    batch = next(batches)
                except StopIteration:
                    break
                except ConfigError as error:
                    # The records before the broken place are good, and waiting for their turn.
                    broken = error
                    break
                under_way.append((batch, submit(batch)))
            if not under_way:
                break
            batch, future = under_way.popleft()
            before = journal.position.offset
            self._write(batch, future.result())
            yield journal.position.offset - before
        if broken is not None:
            raise broken
        yield size - max(begun, journal.position.offset)
        journal.file += 1
        journal.position = BEGINNING
        self._save()

    def _batches(self) -> Iterator[Batch]:
        source, file = self._files[self._journal.file]
        name = self._job.sources[source].name
        left = self._job.limits.get(name, sys.maxsize) - self._journal.read.get(name, 0)
        records = read_records(file, self._journal.position)
        records = itertools.islice(records, left) if left < sys.maxsize else records
        while held := list(_until_broken(itertools.islice(records, BATCH_RECORDS))):
            good = [each for each in held if isinstance(each, RawRecord)]
            if good:
                yield Batch(source, os.fspath(file), self._journal.images[source], good)
            if len(good) < len(held):
                raise held[-1]

    def _write(self, batch: Batch, done: Done) -> None:
        journal = self._journal
        name = self._job.sources[batch.source].name
        drops = b"".join(
            msgspec.json.encode({"source": name, **drop}) + b"\n" for drop in done.drops
        )
        rows = done.rows.tobytes()
        self._blob.write(done.blob)
        self._pixels.write(done.pixels)
        self._rows.write(rows)
        self._drops.write(drops)
        journal.blob_bytes += len(done.blob)
        journal.pixel_bytes += len(done.pixels)
        journal.num_rows += len(done.rows)
        journal.drop_bytes += len(drops)
        journal.position = batch.after
        journal.chain = hashlib.sha256(bytes.fromhex(journal.chain) + done.blob).hexdigest()
        journal.read[name] = journal.read.get(name, 0) + len(batch.records)
        for into, counted in (
            (journal.dropped, Counter(drop["reason"] for drop in done.drops)),
            (journal.repaired, done.repairs),
            (journal.formats, done.formats),
        ):
            into[name] = dict(Counter(into.get(name, {})) + counted)
        if monotonic() - self._saved_at > JOURNAL_EVERY_S:
            self._save()

    def _save(self) -> None:
        for file in self._outputs:
            file.flush()
            os.fsync(file.fileno())
        write_atomically(
            self._out / WORK_NAME / "journal.json", msgspec.json.encode(self._journal).decode()
        )
        self._saved_at = monotonic()


def _until_broken(records: Iterator[RawRecord]) -> Iterator[Any]:
    """The records, and in the end the error instead of raising it, so that none is lost."""
    try:
        yield from records
    except ConfigError as error:
        yield error


@contextlib.contextmanager
def _pool(job: Job) -> Iterator[Any]:
    """A function that has a batch processed, here or by worker processes."""
    if job.workers <= 1:
        _start_worker(job.tokens, job.images, job.pixels)
        yield _process_here
        return
    pool = ProcessPoolExecutor(
        job.workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(job.tokens, job.images, job.pixels),
    )
    try:
        yield lambda batch: pool.submit(_process, batch)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _process_here(batch: Batch) -> Future[Done]:
    future: Future[Done] = Future()
    future.set_result(_process(batch))
    return future


def _opened_at(path: Path, size: int) -> BinaryIO:
    """`path`, cut off at `size` bytes and open for going on there."""
    path.touch()
    file = path.open("r+b")
    if file.seek(0, os.SEEK_END) < size:
        file.close()
        raise ConfigError(f"{path} is shorter than it was.", hint="Start over with --overwrite.")
    file.truncate(size)
    file.seek(size)
    return file


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or out} cannot be used: {error.strerror or error}.",
            hint="Free some space or correct the path, and run the same command again: "
            "it goes on where it stopped.",
        ) from error


def _check_drops(job: Job, journal: Journal, out: Path) -> None:
    for source in job.sources:
        read = journal.read.get(source.name, 0)
        if not read:
            raise ConfigError(
                f"Source {source.name} has no records.", hint="Download its files again."
            )
        dropped = journal.dropped.get(source.name, {})
        if sum(dropped.values()) > job.max_drops * read:
            often = max(dropped, key=lambda reason: dropped[reason])
            raise ConfigError(
                f"Source {source.name}: {sum(dropped.values()):,} of {read:,} records would be "
                f"left out, most of them for {often} ({dropped[often]:,}).",
                hint=f"See {out / DROPS_NAME}. Correct it and start over with --overwrite, or run "
                "this again with a higher --max-drops.",
            )


# --- The end --------------------------------------------------------------------------------------


def _finish(job: Job, out: Path, journal: Journal) -> tuple[DatasetMeta, Report]:
    rows = np.fromfile(out / WORK_NAME / "rows", dtype=ROW)
    starts, pixel_starts = (
        np.concatenate([[0], np.cumsum(rows[field], dtype=np.int64)])[: len(rows)]
        for field in ("size", "pixel_bytes")
    )
    unique, copies = _without_duplicates(rows)
    chosen = _weighted(rows, unique, job)
    columns = {
        "starts": starts[chosen],
        "sizes": rows["size"][chosen],
        "lengths": rows["length"][chosen],
        "num_supervised": rows["num_supervised"][chosen],
        "num_images": rows["num_images"][chosen],
        "source_index": rows["source"][chosen],
        "copies": np.minimum(copies, 65535)[chosen],
        "pixel_starts": pixel_starts[chosen],
    }
    content = hashlib.sha256(bytes.fromhex(journal.chain))
    for name, values in columns.items():
        column = np.ascontiguousarray(values, dtype=COLUMNS[name])
        if name in ("starts", "source_index", "copies"):
            content.update(column.tobytes())
        scratch = out / WORK_NAME / f"{name}.npy"
        np.save(scratch, column)
        os.replace(scratch, out / f"{name}.npy")
    names = [source.name for source in job.sources]
    content.update(msgspec.json.encode(names))
    meta = DatasetMeta(
        sources=[
            Source(
                name=name,
                images=journal.images[at],
                num_rows=int((rows["source"][chosen] == at).sum()),
            )
            for at, name in enumerate(names)
        ],
        measured=job.tokens.measured,
        num_rows=len(chosen),
        blob_bytes=journal.blob_bytes,
        images_opened=job.images != "none",
        fingerprint=content.hexdigest(),
        pixels=job.pixels,
        pixel_bytes=journal.pixel_bytes,
    )
    if job.pixels is None:
        (out / PIXELS_NAME).unlink()
    reports = []
    for at, source in enumerate(job.sources):
        mine = rows["source"] == at
        num_same = int((mine & ~unique).sum())
        num_renamed = int((mine & unique & (copies > 0)).sum())
        counts = {"duplicate": num_same} if num_same else {}
        repaired = {"id_shared": num_renamed} if num_renamed else {}
        reports.append(
            SourceReport(
                name=source.name,
                files=[os.fspath(file) for file in source.files],
                missing_files=list(source.missing),
                images=journal.images[at],
                num_read=journal.read.get(source.name, 0),
                num_kept=int((mine & unique).sum()),
                weight=job.weights.get(source.name, 1.0),
                num_rows=int((rows["source"][chosen] == at).sum()),
                dropped=journal.dropped.get(source.name, {}) | counts,
                repaired=journal.repaired.get(source.name, {}) | repaired,
                formats=journal.formats.get(source.name, {}),
                lengths=summarise(
                    rows[chosen][rows["source"][chosen] == at], job.tokens.max_length
                ),
            )
        )
    return meta, Report(
        sources=reports,
        total=summarise(rows[chosen], job.tokens.max_length),
        measured=job.tokens.measured,
        images_checked=job.images,
        fingerprint=meta.fingerprint,
        missing=_missing_images(out / DROPS_NAME, job.sources),
    )


def _without_duplicates(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which rows to keep, and for each how many other records of its source had its id before.

    The same record again is left out; another record under the same id stays: nothing is lost.
    """
    order = np.lexsort((np.arange(len(rows)), rows["content"], rows["id"], rows["source"]))
    ordered = rows[order]

    def repeats(*fields: str) -> np.ndarray:
        same = np.ones(max(0, len(rows) - 1), dtype=bool)
        for field in fields:
            same &= ordered[field][1:] == ordered[field][:-1]
        return np.concatenate([[False], same])[: len(rows)]

    unique = np.empty(len(rows), dtype=bool)
    unique[order] = ~repeats("source", "id", "content")
    # Now in the order of the file, among what is kept.
    kept = np.flatnonzero(unique)
    order = kept[np.lexsort((kept, rows["id"][kept], rows["source"][kept]))]
    ordered = rows[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (ordered["id"][1:] != ordered["id"][:-1]) | (
        ordered["source"][1:] != ordered["source"][:-1]
    )
    places = np.arange(len(order))
    copies = np.zeros(len(rows), dtype=np.int64)
    copies[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return unique, copies


def _weighted(rows: np.ndarray, unique: np.ndarray, job: Job) -> np.ndarray:
    """The rows of the dataset: each source as often as its weight says."""
    chosen = []
    for at, source in enumerate(job.sources):
        mine = np.flatnonzero(unique & (rows["source"] == at))
        weight = job.weights.get(source.name, 1.0)
        whole = math.floor(weight)
        part = round((weight - whole) * len(mine))
        picked = np.random.default_rng([job.seed, at]).permutation(len(mine))[:part]
        chosen += [mine] * whole + [mine[np.sort(picked)]]
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def _missing_images(drops: Path, sources: Sequence[SourceFiles]) -> dict[str, dict[str, Any]]:
    """Missing images by source and folder: how many records, and where to fetch them."""
    homes = {source.name: source for source in sources}
    missing: dict[str, dict[str, Any]] = {}
    with drops.open("rb") as lines:
        for line in lines:
            if b'"image_missing"' not in line:
                continue
            drop = msgspec.json.decode(line)
            folder = os.path.dirname(drop["detail"])
            entry = missing.setdefault(
                f"{drop['source']}: {folder or '.'}",
                {"num_records": 0, "fetch": homes[drop["source"]].how_to_fetch(folder)},
            )
            entry["num_records"] += 1
    return missing
