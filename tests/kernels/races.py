"""Races that the interpreter hides, where programs run one after the other."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def noticed() -> Iterator[None]:
    """AssertionError where a launch writes an element twice, or reads one that it writes.

    On a GPU the order is anyone's guess then. A program may read an element that it alone writes,
    if it does so before. Nothing is checked on a GPU.
    """
    if torch.cuda.is_available():
        yield
        return
    import numpy
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    launch = GridExecutor.__call__
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store
    read: list = []  # addresses, and which step of which program it was
    written: list = []

    def noted(addresses):
        x, y, z = interpreter_builder.grid_idx
        _, height, depth = interpreter_builder.grid_dim
        step = len(read) + len(written)
        program = (x * height + y) * depth + z
        return addresses, numpy.full(addresses.shape, program), numpy.full(addresses.shape, step)

    def recorded_load(pointers, mask, *args, **options):
        read.append(noted(pointers.data[mask.data]))
        return load(pointers, mask, *args, **options)

    def recorded_store(pointers, value, mask, *args, **options):
        written.append(noted(pointers.data[mask.data]))
        return store(pointers, value, mask, *args, **options)

    def joined(records):
        return [numpy.concatenate(part) for part in zip(*records, strict=True)]

    def checked_launch(self, *args, **kwargs):
        read.clear()
        written.clear()
        launch(self, *args, **kwargs)
        if not written:
            return
        elements, writer, when = joined(written)
        order = numpy.argsort(elements)
        elements, writer, when = elements[order], writer[order], when[order]
        assert not (elements[1:] == elements[:-1]).any(), "an element is written twice"
        if not read:
            return
        addresses, reader, before = joined(read)
        at = numpy.minimum(numpy.searchsorted(elements, addresses), len(elements) - 1)
        own = (reader == writer[at]) & (before < when[at])
        mixed = (elements[at] == addresses) & ~own
        assert not mixed.any(), "an element is read and written in one launch"

    with (
        mock.patch.object(GridExecutor, "__call__", checked_launch),
        mock.patch.object(interpreter_builder, "create_masked_load", recorded_load),
        mock.patch.object(interpreter_builder, "create_masked_store", recorded_store),
    ):
        yield
