"""Memory: what is estimated beforehand, what the limit decides, what there is, and the peaks of spans."""

from __future__ import annotations

import mmap
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import write_series
from predicting import affine_of, limited, save, voxels

from medseg import io, memory
from medseg.errors import InputError
from medseg.geometry import Geometry
from medseg.memory import PeakMemory, Strategy
from medseg.package import ModelPackage
from medseg.predict import Predictor
from medseg.sliding_window import buffer_bytes
from medseg.volume import Volume


def test_memory_is_estimated_beforehand(package: ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    model = limited(package, monkeypatch, 1000)
    setup = package.configuration
    assert (setup.patch_size, setup.network.features[0], package.plan.outputs) == ((8, 16, 16), 8, 3)
    source = Volume(np.zeros((1, 200, 300, 50), np.int16), Geometry((200, 300, 50), np.diag([1.0, 1, 2, 1])))
    whole, half = (model.memory.need(source, Strategy(on_device=False, blocks=n), (100, 200, 300)) for n in (1, 2))
    prepared, native = 4 * 100 * 200 * 300, 200 * 300 * 50
    assert whole.preparing == pytest.approx((2 * native + prepared) / 2**20)
    patch = 8 * 16 * 16
    tile = 4 * patch * (10 * 8 + 2 * 3)
    buffer = buffer_bytes((100, 200, 300), (8, 16, 16), 3)
    planes = 2 * 4 * 3 * 100 * 200
    assert whole.network == pytest.approx((prepared + native + tile + buffer + planes) / 2**20)
    assert whole.device == 0
    saved_mb = (buffer - buffer_bytes((100, 200, 300), (8, 16, 16), 3, 2) + planes // 2) / 2**20
    assert whole.network - half.network == pytest.approx(saved_mb)
    assert half.network < whole.network


def test_the_limit_decides_on_the_strategy(package: ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = limited(package, monkeypatch, 1000).prepare(io.volume_of((voxels(), affine_of("axial"))))
    whole = limited(package, monkeypatch, 1000)
    shape = ready.prepared.trace.plan_shape
    needed = [100 + whole.memory.need(ready.source, s, shape).network for s in whole.memory.strategies]
    assert needed == sorted(needed, reverse=True)
    assert whole.budget(ready).strategies == tuple(whole.memory.strategies)
    assert str(whole.budget(ready)) == f"about {needed[0] / 1024:.1f} GB of 1.0 GB, summed on the host"
    tight = limited(package, monkeypatch, needed[1])
    assert tight.budget(ready).strategies[0] == Strategy(on_device=False, blocks=2)
    np.testing.assert_array_equal(tight.infer(ready)[0].array, whole.infer(ready)[0].array)
    with pytest.raises(InputError, match=r"needs about 0\.1 GB of memory even .* in 16 blocks .*--memory-limit"):
        limited(package, monkeypatch, needed[-1] - 0.001).infer(ready)


def test_shear_holes_and_an_earlier_model_take_more_to_prepare(
    package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = limited(package, monkeypatch, 1000).memory
    source = Volume(np.zeros((1, 100, 100, 50), np.int16), Geometry((100, 100, 50), np.eye(4)))
    strategy, shape, native = plain.strategies[0], (50, 100, 100), 100 * 100 * 50
    least = plain.need(source, strategy, shape).preparing
    (rule,) = package.plan.normalisation
    body = package.plan.model_copy(update={"normalisation": (rule.model_copy(update={"nonzero_only": True}),)})
    assert replace(plain, plan=body).need(source, strategy, shape).preparing == pytest.approx(
        least + 5 * native / 2**20
    )
    cascade = replace(plain, earlier=plain).need(source, strategy, shape).preparing
    assert cascade == pytest.approx(least + (3 * native + native) / 2**20)
    turned = package.plan.model_copy(update={"orientation": "RAS"})
    sheared = Volume(source.array, Geometry((100, 100, 50), affine_of("sheared")))
    upright = sheared.geometry.reoriented(sheared.geometry.to("RAS")).orthogonalised()
    assert np.prod(upright.shape) > native
    found = replace(plain, plan=turned).need(sheared, strategy, shape).preparing
    assert found == pytest.approx(least + 4 * np.prod(upright.shape) / 2**20)


def test_a_cascade_fits_where_both_its_models_do(package: ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = limited(package, monkeypatch, 1000).memory
    source = Volume(np.zeros((1, 100, 100, 50), np.int16), Geometry((100, 100, 50), np.eye(4)))
    assert replace(plain, earlier=plain).fits(source, 0)
    assert not replace(plain, earlier=replace(plain, most_mb=101)).fits(source, 0)
    assert not plain.fits(source, 950)


def test_a_series_is_estimated_by_its_headers(
    package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "scan", voxels()[0], spacing=(0.9, 0.9, 2.5))
    series = io.series(tmp_path / "scan")
    plenty = limited(package, monkeypatch, 1000)
    needed = plenty.memory.preparing_mb([series])
    assert needed == plenty.memory.preparing_mb([tmp_path / "scan"]) >= 2 * voxels().size / 2**20
    with pytest.raises(InputError, match=f"^{series.name}: needs about .* to be read and prepared"):
        limited(package, monkeypatch, 100 + 0.9 * needed).read([series])
    assert plenty.read([series]).array.shape == voxels().shape
    none = replace(series, geometry=None, reason="is odd")
    assert plenty.memory.preparing_mb([none]) == 0


def test_the_voxels_of_a_file_are_gone_when_the_network_runs(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    held, read, infer = list[Any](), io.read_volume, Predictor.infer

    def watched(paths: Any, channels: int) -> Volume:
        volume = read(paths, channels)
        held.append(weakref.ref(volume))
        return volume

    def looking(self: Predictor, *arguments: Any, **choices: Any) -> Any:
        alive.append((held[0](), choices.get("besides_mb", 0)))
        return infer(self, *arguments, **choices)

    monkeypatch.setattr(io, "read_volume", watched)
    monkeypatch.setattr(Predictor, "infer", looking)
    predictor(save(tmp_path / "a.nii.gz", voxels()[0]))
    assert alive == [(None, 0)]
    predictor.segment(io.volume_of((voxels(), affine_of("axial"))), 5.0)
    assert alive[1][1] == pytest.approx(5.0 + 2 * 20 * 18 * 9 / 2**20)  # whoever calls holds them


def test_limits_of_control_groups_count(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    own = tmp_path / "own"

    def group(folder: str, limit: str, used: int, files: tuple[str, str], idle: str) -> None:
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / files[0]).write_text(limit + "\n")
        (root / folder / files[1]).write_text(f"{used}\n")
        (root / folder / "memory.stat").write_text(f"anon 5\n{idle} 100\n")

    second = ("memory.max", "memory.current")
    group("job/step", "1000", 300, second, "inactive_file")
    group("job", "max", 300, second, "inactive_file")
    group("", "5000", 4900, second, "inactive_file")
    own.write_text("0::/job/step\n")
    assert list(memory._rooms_in_groups(root, own)) == [1000 - 300 + 100, 5000 - 4900 + 100]
    group("memory", "2000", 700, ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file")
    own.write_text("4:memory:/not/in/this/container\n3:cpuset:/\n")
    assert list(memory._rooms_in_groups(root, own)) == [2000 - 700 + 100]
    assert list(memory._rooms_in_groups(root, tmp_path / "nothing")) == []
    assert memory.free_mb() > 0


def can_be_set_back() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not can_be_set_back(), reason="this system does not set the mark of a process back")
def test_spans_have_peaks_of_their_own_also_where_they_overlap() -> None:
    spans = PeakMemory()
    spans.begin("whole")
    spans.begin("large")
    with mmap.mmap(-1, 2**26) as room:  # not from the allocator, which may have 64 MB left over
        for _ in range(64):
            room.write(bytes(2**20))
    large = spans.peak("large")
    spans.end("large")
    spans.begin("small")
    small, whole = spans.peak("small"), spans.peak("whole")
    assert large - small > 50
    assert whole == large


def test_where_the_mark_cannot_be_had_it_is_the_process_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "nothing")
    spans = PeakMemory()
    spans.begin("a")
    peak = spans.peak("a")
    assert 10 < peak < 100_000


def test_spans_of_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter(range(1, 1000))
    monkeypatch.setattr(memory, "_high_water_mark", lambda: float(next(marks)))
    spans = PeakMemory()
    peaks: list[float] = []

    def one(name: str) -> None:
        spans.begin(name)
        peaks.append(spans.peak(name))
        spans.end(name)

    threads = [threading.Thread(target=one, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(peaks) == 8
    assert max(peaks) <= 24  # each mark is read once
