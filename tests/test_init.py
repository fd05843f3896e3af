"""The package itself: its names are the doors of its rooms, brought when they are asked for."""

from __future__ import annotations

import importlib.metadata

import medseg
import medseg.errors
import medseg.io
import medseg.pipeline
import medseg.predict
import medseg.segmenter


def test_the_names_are_those_of_the_rooms() -> None:
    assert medseg.load is medseg.predict.load
    assert medseg.run is medseg.pipeline.run
    assert medseg.series is medseg.io.series
    assert medseg.MedsegError is medseg.errors.MedsegError
    assert medseg.Segmenter is medseg.segmenter.Segmenter


def test_the_version_is_the_one_that_is_installed() -> None:
    assert medseg.__version__ == importlib.metadata.version("medseg")


def test_a_star_brings_the_public_names_and_no_other() -> None:
    space: dict[str, object] = {}
    exec("from medseg import *", space)
    assert sorted(set(space) - {"__builtins__"}) == medseg.__all__
