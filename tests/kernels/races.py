"""Races that the interpreter hides, where programs run one after the other."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """AssertionError where a launch writes an element twice, or reads one that it writes.

    On a GPU the order is anyone's guess then. Nothing is checked there.
    """
    if torch.cuda.is_available():
        yield
        return
    import numpy
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    launch = GridExecutor.__call__
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    read: list = []
    written: list = []

    def recorded_load(pointers, mask, *args, **options):
        read.append(pointers.data[mask.data])
        return load(pointers, mask, *args, **options)

    def recorded_store(pointers, value, mask, *args, **options):
        written.append(pointers.data[mask.data])
        return store(pointers, value, mask, *args, **options)

    def checked_launch(self, *args, **kwargs):
        read.clear()
        written.clear()
        launch(self, *args, **kwargs)
        if written:
            elements = numpy.sort(numpy.concatenate(written))
            assert not (elements[1:] == elements[:-1]).any(), "an element is written twice"
            mixed = read and numpy.isin(numpy.concatenate(read), elements).any()
            assert not mixed, "an element is read and written in one launch"

    with (
        mock.patch.object(GridExecutor, "__call__", checked_launch),
        mock.patch.object(interpreter_builder, "create_masked_load", recorded_load),
        mock.patch.object(interpreter_builder, "create_masked_store", recorded_store),
    ):
        yield
