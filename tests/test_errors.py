"""The exceptions: their messages, their tree and their survival between processes."""

from __future__ import annotations

import pickle

import pytest

from medseg import errors
from medseg.errors import DatasetError, InputError, MedsegError, PlanError, UnreadableFile


def test_message_says_where_found_expected_and_remedy_in_that_order() -> None:
    error = InputError("a.nii", "has 2 channels", "1", "split it")
    assert str(error) == "a.nii: has 2 channels (expected 1). Split it"


def test_message_without_expected_and_remedy() -> None:
    assert str(MedsegError("a.nii", "is empty")) == "a.nii: is empty"


def test_parts_are_kept() -> None:
    error = PlanError("plan", "x", "y", "z")
    assert (error.where, error.found, error.expected, error.remedy) == ("plan", "x", "y", "z")


@pytest.mark.parametrize("kind", [e for e in vars(errors).values() if isinstance(e, type)])
def test_every_error_is_a_medseg_error_named_in_the_tree_and_survives_a_process(kind: type[MedsegError]) -> None:
    assert issubclass(kind, MedsegError)
    assert kind.__name__ in (errors.__doc__ or "")
    copy = pickle.loads(pickle.dumps(kind("w", "f", "e", "r")))
    assert type(copy) is kind
    assert str(copy) == "w: f (expected e). R"


def test_the_tree() -> None:
    assert issubclass(UnreadableFile, InputError)
    assert not issubclass(DatasetError, InputError)
