"""Batches of cases that survive bad inputs, little memory and interruptions."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from medseg import io, quality, stats
from medseg.cases import MaskFormat, Shard, files_of, find_cases, mask_names, probability_name, require_apart
from medseg.dataset import Case
from medseg.errors import InputError, MedsegError
from medseg.io import label_tables, nifti
from medseg.io.dicom import Series
from medseg.journal import Journal, Prediction, versions
from medseg.memory import PeakMemory
from medseg.predict import Predictor, Ready
from medseg.progress import Progress, silent
from medseg.records import Record, digest_file, digest_of, replacing, write_text
from medseg.sliding_window import is_out_of_memory
from medseg.volume import Mask, Volume

log = logging.getLogger(__name__)

TABLE_SECONDS = 30.0
"""Tables of a long batch are written so often."""
PATIENCE_SECONDS = 5.0
"""An interrupted batch waits so long for the mask that is being written."""


class Outputs(Record):
    """What is written of every case, and how.

    Attributes:
        formats: of the mask, each once.
        seg_type: kind of a DICOM SEG; LABELMAP, which fewer viewers know, is smaller.
        allow_uncoded: whether labels without a code of SNOMED CT may go into a DICOM SEG.
    """

    formats: tuple[MaskFormat, ...] = Field(default=("nii.gz",), min_length=1)
    seg_type: Literal["binary", "labelmap"] = "binary"
    allow_uncoded: bool = False

    @field_validator("formats")
    @classmethod
    def _once(cls, formats: tuple[MaskFormat, ...]) -> tuple[MaskFormat, ...]:
        return tuple(dict.fromkeys(formats))

    @property
    def key(self) -> list[str]:
        """What files of one name depend on."""
        return ["labelmap"] if "dicom-seg" in self.formats and self.seg_type == "labelmap" else []


NIFTI = Outputs()


def predict_folder(
    predictor: Predictor,
    places: Path | str | Sequence[Path | str],
    out: Path,
    *,
    outputs: Outputs = NIFTI,
    shard: Shard | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Prediction]:
    """Find images (see ``find_cases``) and segment them, or a shard's share of them, as ``predict_cases`` does.

    Raises:
        InputError, DatasetError: as ``find_cases``.
    """
    wanted = [places] if isinstance(places, Path | str) else places
    cases = find_cases(*wanted, progress=progress)
    return predict_cases(
        predictor,
        cases,
        out,
        outputs=outputs,
        shard=shard,
        overwrite=overwrite,
        found_at=places_of(wanted),
        progress=progress,
    )


def places_of(
    places: Sequence[Path | str], series: Sequence[str] = (), resample_irregular: bool = False
) -> dict[str, Any]:
    """What ``find_cases`` was called with, as plain data by which the same cases can be found again later."""
    inputs = [str(Path(place).absolute()) for place in places]
    return {"inputs": inputs, "series": list(series), "resample_irregular": resample_irregular}


def predict_cases(
    predictor: Predictor,
    cases: Sequence[Case],
    out: Path,
    *,
    outputs: Outputs = NIFTI,
    shard: Shard | None = None,
    overwrite: bool = False,
    found_at: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> list[Prediction]:
    """Segment cases into a folder: the mask of each, named by ``mask_names``, ``cases.csv`` and ``run.json``.

    Beside masks of volumes go tables of their labels for other programs, see ``medseg.io.label_tables``; where there
    is a file of such a name that is not from here, or was changed, it stays, and a warning is logged.

    While a case is on the network, the next is read and prepared and the one before written, where memory allows it.

    A case that fails is recorded with its reason, and the others are done. A case whose files are there and were made
    from the same input, model and settings (by digest) is kept. A file that was not written here, or was changed since,
    is not replaced, unless ``overwrite`` says so. Probabilities go into ``probabilities/CASE``, one NIfTI file a class.

    Args:
        predictor: a model.
        cases: the images of all shards.
        out: folder; it may be shared by shards, which have a journal, a table and a run record each.
        outputs: the formats of the masks.
        shard: which of the cases are this process's; None for all of them.
        overwrite: replace files that are not from here.
        found_at: where the cases were found (``places_of``), for ``run.json``: a report looks for the images there.
        progress: told how far it is, also within a case.

    Returns:
        One record a case, in the order of the cases.

    Raises:
        InputError: the folder holds input images; the network in 8 bits is not there and each shard would make one;
            cases of DICOM have another number of series than the model channels; or a DICOM SEG is wanted of images
            that are not DICOM, or of labels without codes.
        KeyboardInterrupt: passed on, after the mask that was being written and the tables.
        OSError: the tables cannot be written.
    """
    require_apart(cases, out)
    require_fitting(predictor, cases, outputs)
    out.mkdir(parents=True, exist_ok=True)
    own = shard.share(cases) if shard else list(cases)
    batch = _Batch(predictor, own, out, outputs, shard, overwrite, found_at or {}, progress)
    if not all(io.is_picture(case.images[0]) for case in cases):
        batch.write_label_tables()
    return batch.run()


@dataclass
class _Work:
    """A case on its way through the stages, and what is known of it so far."""

    case: Case
    input_digest: str = ""
    key: str = ""
    volume: Volume | None = None
    sample: quality.Sample | None = None
    ready: Ready | None = None
    mask: Mask | None = None
    margins: dict[str, float] = field(default_factory=dict)
    probabilities: nifti.Probabilities | None = None
    strategy: str = ""
    stages: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    lacked_memory: bool = False
    record: Prediction | None = None

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What goes wrong inside is the case's reason to fail; the failure is not kept, as its frames hold arrays."""
        try:
            yield
        except Exception as failure:  # noqa: BLE001 - whatever is wrong with one case, the others are done
            self.reason = _reason(failure, any(isinstance(image, Series) for image in self.case.images))
            frames = [] if isinstance(failure, MedsegError) else traceback.format_tb(failure.__traceback__)
            log.info("%s: %s", self.case.id, "".join([self.reason, "\n", *frames] if frames else [self.reason]))
            self.lacked_memory = is_out_of_memory(failure)
            self.volume = self.ready = self.mask = None

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add to the seconds of a stage."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = round(self.stages.get(name, 0.0) + time.monotonic() - start, 3)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage: guarded and timed."""
        with self.guarded(), self.timed(name):
            yield


class _Batch:
    """Cases on their way: read and prepared ahead in one thread, on the network here, written in another thread."""

    def __init__(
        self,
        predictor: Predictor,
        cases: Sequence[Case],
        out: Path,
        outputs: Outputs,
        shard: Shard | None,
        overwrite: bool,
        found_at: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self.predictor, self.cases, self.out, self.outputs, self.shard = predictor, cases, out, outputs, shard
        self.overwrite, self.found_at, self.progress = overwrite, found_at, progress
        self.journal = Journal(out, shard)
        self.peaks = PeakMemory()
        self.model = self._model_key()
        self.begun = self.shown = time.monotonic()
        self.fraction = 0.0

    def run(self) -> list[Prediction]:
        """All cases, one after the other."""
        reader, writer = _Aside(self._read), _Aside(self._write)
        try:
            for number, case in enumerate(self.cases):
                work = self._next(reader, case)
                besides_mb = self._read_ahead(reader, work, number)
                self._network(work, number, besides_mb)
                self._await(writer)
                if work.mask is None:  # nothing to write
                    self._settle(self._write(work))
                else:
                    writer.ask(work)
            self._await(writer)
        finally:
            reader.dismiss()
            self._await(writer, PATIENCE_SECONDS)
            writer.dismiss()
            self._write_tables()
        return [self.journal.results[case.id] for case in self.cases]

    def write_label_tables(self) -> None:
        """Write the tables of labels; in the journal they are the files of a case without a name."""
        tables = label_tables.tables(self.predictor.labels)
        digests: dict[str, str] = {}
        for name, text in tables.items():
            path, digest = self.out / name, hashlib.sha256(text.encode()).hexdigest()
            if path.is_file() and digest_file(path) == digest:
                continue
            if path.exists() and not (self.overwrite or self.journal.wrote("", name)):
                log.warning("%s: was not written here, or changed since: it stays, and may not fit the masks", path)
                continue
            digests[name] = digest
        if digests:
            (first, digest), *others = digests.items()
            written = {"output": first, "output_digest": digest, "mask_digests": dict(others)}
            self.journal.add(Prediction(case="", status="done", **written))
        for name in digests:
            write_text(self.out / name, tables[name])

    def _model_key(self) -> str:
        """What all keys begin with. Where it takes networks in 8 bits, these are made first.

        Raises:
            InputError: they are not there, and each shard would make its own.
        """
        if self.predictor.needs_calibration and self.shard and self.shard.count > 1:
            found = "the network in 8 bits is not there, and each shard would make its own"
            raise InputError("--engine openvino-int8", found, "one for all", "run `medseg quantise` first")
        for case in sorted(self.cases, key=lambda case: case.id):
            if not self.predictor.needs_calibration:
                break
            work = _Work(case)  # what is wrong with it is told when its turn comes
            with work.guarded():
                self.predictor.calibrate(self.predictor.prepare(self.predictor.read(case.images)))
        return self.predictor.key

    def _next(self, reader: _Aside, case: Case) -> _Work:
        """A case that was read ahead, or is read now."""
        if not reader.is_busy:
            return self._read(case)
        work: _Work = reader.answer()
        if work.lacked_memory:
            log.warning("%s: out of memory while it was read ahead: once more alone", case.id)
            return self._read(case)
        return work

    def _read_ahead(self, reader: _Aside, work: _Work, number: int) -> float:
        """Have the case after this one read, where there is memory for both; what it takes, MB."""
        source = work.ready.source if work.ready else work.volume
        if number + 1 == len(self.cases) or source is None:
            return 0.0
        following = self.cases[number + 1]
        needed = self.predictor.memory.preparing_mb(following.images)
        if not self.predictor.memory.fits(source, needed):
            return 0.0
        reader.ask(following)
        return needed

    def _read(self, case: Case) -> _Work:
        """Read and prepare a case, unless it is done already."""
        work = _Work(case)
        self.peaks.begin(case.id)
        with work.stage("read"):
            self._open(work)
        if work.volume is not None and not self.predictor.is_cascade:
            with work.stage("prepare"):
                work.ready, work.volume = self.predictor.prepare(work.volume), None
        return work

    def _open(self, work: _Work) -> None:
        case = work.case
        _require_one_image(case)
        work.input_digest = _input_digest(case)
        work.key = digest_of([self.model, work.input_digest, *self.outputs.key])
        work.record = self.journal.kept(case.id, work.key, self._files(case))
        if work.record is None:
            self._require_free(case)
            work.volume = self.predictor.read(case.images)
            work.sample = quality.Sample.of(work.volume.array)

    def _network(self, work: _Work, number: int, besides_mb: float) -> None:
        """From the image, or what was prepared of it, to the mask."""
        if work.volume is not None:
            with work.stage("prepare"):
                work.ready, work.volume = self.predictor.prepare(work.volume, besides_mb), None
        if work.ready is None:
            return
        ready, work.ready = work.ready, None
        for warning in ready.source.warnings:
            log.warning("%s: %s", work.case.id, warning)
        with work.stage("network"):
            budget = self.predictor.budget(ready, besides_mb)
            log.info("%s: %s", work.case.id, budget)
            note = f"{work.case.id} ({number + 1} of {len(self.cases)}), {budget}"
            self._report(number, note)
            if self.predictor.classes:
                work.probabilities = self._probabilities(ready)
            work.mask, strategy, work.margins = self.predictor.infer(
                ready,
                work.probabilities.put if work.probabilities else None,
                # not the whole: it is still to be written
                report=lambda fraction: self._report(number + 0.99 * fraction, note),
                besides_mb=besides_mb,
            )
            work.strategy = str(strategy)

    def _probabilities(self, ready: Ready) -> nifti.Probabilities:
        return nifti.Probabilities(ready.source.geometry.shape, len(self.predictor.classes), self.out)

    def _write(self, work: _Work) -> Prediction:
        """Write what came out of a case, and say what became of it."""
        if work.mask is not None:
            self._save(work, work.mask)
            work.mask = None
        if work.probabilities is not None:
            with work.guarded():
                work.probabilities.close()
            work.probabilities = None
        with work.guarded():
            self._remove_outdated(work)
        if work.reason or work.record is None:
            work.record = self._record(work, status="failed", reason=work.reason)
        self.peaks.end(work.case.id)
        return work.record

    def _save(self, work: _Work, mask: Mask) -> None:
        """All files of a case: none has its name before all are whole, and the journal says what they are."""
        with work.guarded(), contextlib.ExitStack() as renamed_at_the_end:
            with work.timed("write"):
                facts = self._written(work, mask, renamed_at_the_end)
            work.record = self._record(work, status="done", **facts)
            self.journal.add(work.record)

    def _written(self, work: _Work, mask: Mask, stack: contextlib.ExitStack) -> dict[str, Any]:
        """Write the files of a case under temporary names, and say what is in them."""
        masks: dict[str, str] = {}
        probabilities: dict[str, str] = {}
        for form, name in zip(self.outputs.formats, self._masks(work.case), strict=True):
            temporary = stack.enter_context(replacing(self.out / name))
            io.write_mask(mask, temporary, **(self._seg_options() if form == "dicom-seg" else {}))
            masks[name] = digest_file(temporary)
        for index, name in enumerate(self._probability_files(work.case)):
            if work.probabilities is not None:
                temporary = stack.enter_context(replacing(self.out / name))
                work.probabilities.write(index, mask, temporary)
                probabilities[name] = digest_file(temporary)
        first = next(iter(masks))
        return {
            "output": first,
            "output_digest": masks.pop(first),
            "mask_digests": masks,
            "probability_digests": probabilities,
            "volumes_ml": {name: round(ml, 4) for name, ml in mask.volumes_ml().items()},
            "qc_flags": self._flags(work, mask),
            "warnings": mask.warnings,
        }

    def _flags(self, work: _Work, mask: Mask) -> tuple[str, ...]:
        """What is unusual about a mask; regions are looked at by the labels that they unite."""
        package = self.predictor.package
        medians = work.sample.medians(mask.array) if work.sample else ()
        labels = self.predictor.labels.model_copy(update={"regions": {}})
        return quality.flags(
            stats.measure(None, replace(mask, labels=labels)),
            mask.geometry,
            list(zip(package.plan.channels, medians, strict=bool(medians))),
            work.margins,
            package.manifest.ranges,
        )

    def _record(self, work: _Work, **facts: Any) -> Prediction:
        return Prediction(
            case=work.case.id,
            seconds=round(math.fsum(work.stages.values()), 3),
            stages=dict(work.stages),
            peak_memory_mb=self.peaks.peak(work.case.id),
            strategy=work.strategy,
            key=work.key,
            input_digest=work.input_digest,
            **facts,
        )

    def _seg_options(self) -> dict[str, Any]:
        """What a DICOM SEG says of its maker, and how it is written."""
        package, outputs = self.predictor.package, self.outputs
        return {
            "kind": outputs.seg_type.upper(),
            "allow_uncoded": outputs.allow_uncoded,
            "model": package.manifest.name,
            "version": package.digest[:12],
        }

    def _files(self, case: Case) -> list[str]:
        """Files of a case, relative to the folder: its mask in every format, and one a class of probabilities."""
        return [*self._masks(case), *self._probability_files(case)]

    def _masks(self, case: Case) -> tuple[str, ...]:
        return mask_names(case, self.outputs.formats)

    def _probability_files(self, case: Case) -> list[str]:
        return [probability_name(case.id, name) for _, name in self.predictor.classes]

    def _require_free(self, case: Case) -> None:
        """Refuse to write where there is a file that is not from here, or no longer as it was written.

        Raises:
            InputError: see above; or the id cannot name a file.
        """
        if Path(case.id).name != case.id:
            raise InputError(case.id, "cannot name a mask", "an id without slashes")
        remedy = "move it away, or use --overwrite"
        for name in self._files(case):
            target = self.out / name
            if not target.exists():
                continue
            if self.overwrite or self.journal.wrote(case.id, name):
                continue
            if not self.journal.knows(case.id, name):
                raise InputError(target, "exists and was not written here", "a free name", remedy)
            if _is_image(target):
                raise InputError(target, "was changed since it was written", "a free name", remedy)

    def _remove_outdated(self, work: _Work) -> None:
        """Files of another image than is there now would be taken for this one's."""
        if work.input_digest:
            for path in self.journal.outdated(work.case.id, work.input_digest):
                path.unlink(missing_ok=True)

    def _await(self, writer: _Aside, patience: float | None = None) -> None:
        """Wait for the case that was given to the writer, if one was."""
        if not writer.is_busy:
            return
        try:
            self._settle(writer.answer(patience))
        except queue.Empty:
            log.warning("a mask was still being written, and is left out")

    def _settle(self, record: Prediction) -> None:
        """Take down what became of a case."""
        self.journal.results[record.case] = record
        if record.status == "failed":
            log.error("%s failed: %s", record.case, record.reason)
        done = len(self.journal.results)
        self._report(done, f"{record.case} {record.status} ({done} of {len(self.cases)})")
        if time.monotonic() - self.shown > TABLE_SECONDS:
            self.shown = time.monotonic()
            self._write_tables()

    def _report(self, cases: float, note: str) -> None:
        self.fraction = max(self.fraction, cases / len(self.cases))
        self.progress("predicting", self.fraction, note)

    def _write_tables(self) -> None:
        predictor = self.predictor
        labels = predictor.labels
        facts = {
            "model": predictor.package.manifest.name,
            "model_digest": predictor.package.digest,
            "versions": versions(),
            "device": str(predictor.device),
            "engine": predictor.engine,
            "threads": torch.get_num_threads(),
            "settings": predictor.settings.model_dump(mode="json"),
            "outputs": self.outputs.model_dump(mode="json"),
            "labels": labels.model_dump(mode="json"),
            **self.found_at,
            "shard": f"{self.shard.index}/{self.shard.count}" if self.shard else None,
            "wall_seconds": round(time.monotonic() - self.begun, 1),
        }
        self.journal.write_tables([*labels.names, *labels.regions], len(self.cases), facts)


class _Aside:
    """A function in a daemon thread of its own, called once at a time.

    Threads of a ThreadPoolExecutor would be waited for at the end of an interrupted program, however long they take.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.is_busy = False
        self._function = function
        self._asked: queue.Queue[Any] = queue.Queue()
        self._answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
        self._thread: threading.Thread | None = None

    def ask(self, item: Any) -> None:
        """Have the function called with an item."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"medseg {self._function.__name__}", daemon=True)
            self._thread.start()
        self.is_busy = True
        self._asked.put(item)

    def answer(self, timeout: float | None = None) -> Any:
        """What the function returned, or what it raised raised here.

        Raises:
            queue.Empty: it takes longer than ``timeout`` seconds.
        """
        result, failure = self._answers.get(timeout=timeout)
        self.is_busy = False
        if failure is not None:
            raise failure
        return result

    def dismiss(self) -> None:
        """End the thread after what it does."""
        self._asked.put(None)

    def _work(self) -> None:
        while (item := self._asked.get()) is not None:
            try:
                self._answers.put((self._function(item), None))
            except BaseException as failure:  # noqa: BLE001 - it belongs to whoever asked
                self._answers.put((None, failure))
            del item


def require_fitting(predictor: Predictor, cases: Sequence[Case], outputs: Outputs) -> None:
    """Refuse what no case could give.

    Raises:
        InputError: of the cases of DICOM none has a series a channel; or a DICOM SEG is wanted of images that are not
            DICOM, or of labels without codes that are not allowed.
    """
    _require_series(predictor, cases)
    if "dicom-seg" in outputs.formats:
        _require_dicom(predictor, cases, outputs)


def _require_series(predictor: Predictor, cases: Sequence[Case]) -> None:
    channels = predictor.package.plan.channels
    usable = [case for case in cases if isinstance(case.images[0], Series) and not case.images[0].reason]
    counts = {len(case.images) for case in usable}
    if counts and len(channels) not in counts:
        expected = f"{len(channels)}, one a channel: {', '.join(channels)}"
        found = f"picks {min(counts)} of a study"
        raise InputError("--series", found, expected, "give --series once a channel, in this order")


def _require_dicom(predictor: Predictor, cases: Sequence[Case], outputs: Outputs) -> None:
    where = "--format dicom-seg"
    others = [case.id for case in cases if not io.is_dicom(case.images[0])]
    if others:
        remedy = "leave it out; `medseg convert` makes one of a mask and the series that it lies on"
        raise InputError(where, f"{len(others)} of {len(cases)} images are no DICOM, as {others[0]}", "DICOM", remedy)
    labels = predictor.labels
    uncoded = [label for label in labels.names if labels.coding(label) is None]
    if uncoded and not outputs.allow_uncoded:
        remedy = 'name it as a structure that SNOMED CT has, put "codings" into dataset.json, or use --allow-uncoded'
        raise InputError(where, f"has no code for {', '.join(uncoded)}", "a code for every label", remedy)


def _reason(failure: Exception, of_dicom: bool) -> str:
    """What a failure says; of an unexpected one of DICOM its kind alone: libraries quote what headers hold."""
    if isinstance(failure, MedsegError):
        return str(failure)
    told = isinstance(failure, OSError) or not of_dicom
    return f"{type(failure).__name__}: {failure}" if told else f"{type(failure).__name__}, which nobody expected"


def _input_digest(case: Case) -> str:
    """Digest of the files of an image; of a DICOM series also of which it is, as a zip may hold several.

    Raises:
        InputError: a file cannot be read.
    """
    which = [[one.uid, one.part, one.irregular, one.reason] for one in case.images if isinstance(one, Series)]
    try:
        return digest_of([*(digest_file(path) for path in files_of(case)), *which])
    except OSError as failure:
        path, remedy = failure.filename or case.id, "correct the path in the list, or the rights of the file"
        raise InputError(path, f"cannot be read: {failure.strerror}", "an image", remedy) from None


def _require_one_image(case: Case) -> None:
    """Refuse ``a.nii`` beside ``a.nii.gz``: two images, or one in two formats, and nothing says which is meant."""
    names = {(path.parent, io.name_of(source)) for path, source in zip(case.paths, case.images, strict=True)}
    if len(names) == len(case.images):
        return
    if any(isinstance(source, Series) for source in case.images):
        raise InputError(case.id, "has one series for several channels", "another series each", "name them by --series")
    found = f"is the name of several images: {' and '.join(path.name for path in case.paths)}"
    raise InputError(case.id, found, "one image a case", "rename or remove one")


def _is_image(path: Path) -> bool:
    try:
        io.format_of(path).read_labels(path)
    except InputError:
        return False
    return True
