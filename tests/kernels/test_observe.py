"""A new record is kept if it repeats the call that it was made of, bit for bit."""

import contextlib
import threading
import types

import pytest
import torch

from lora_kernels.kernels import records
from lora_kernels.kernels.records import Call, observe
from lora_kernels.kernels.tape import Tape

KEY = ("op", "a kind that no other test has")


@pytest.fixture
def call(monkeypatch):
    """A call of a kind that was seen once, as if it were on a GPU."""
    active = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda i: 0)
    monkeypatch.setattr(records, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(records, "_can_repeat", lambda call: True)
    monkeypatch.setattr(records, "_records", {KEY: None})
    return Call(KEY, [torch.arange(6.0).view(2, 3), torch.ones(3, 2)])


def compute(call):
    return [torch.mm(*call.tensors), None]


def test_a_record_that_repeats_the_call_is_kept(call):
    result = observe(call, lambda: compute(call))
    record = records._records[KEY]
    assert callable(record)
    assert torch.equal(record(0, *call.tensors)[0], result[0])
    assert Call(KEY, call.tensors).record is record


def test_a_result_with_nan_has_bits_too(call):
    call.tensors[0][0, 0] = torch.nan
    observe(call, lambda: compute(call))
    assert callable(records._records[KEY])


def test_a_record_is_repeated_on_the_device_of_its_operands(call, monkeypatch):
    entered, streams = [], []
    on_gpu = types.SimpleNamespace(get_device=lambda: 1)

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield
        entered.remove(index)

    def record(stream, *tensors):
        streams.append((stream, *entered))
        return []

    active = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda i: i)
    monkeypatch.setattr(records, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", device)
    assert records._repeats(record, Call(KEY, [on_gpu]), [])
    assert streams == [(1, 1)]


def test_a_record_begun_before_all_were_dropped_is_not_kept(call):
    def changed():
        records.forget()
        return compute(call)

    observe(call, changed)
    assert KEY not in records._records


def test_records_may_be_dropped_while_a_kind_is_looked_up(call, monkeypatch):
    threads = []

    class Looked(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            threads.append(threading.Thread(target=records.forget))
            threads[-1].start()
            threads[-1].join(0.2)  # it waits until the kind is looked up
            return found

    monkeypatch.setattr(records, "_records", Looked({KEY: None}))
    result = observe(call, lambda: compute(call))
    for thread in threads:
        thread.join()
    assert torch.equal(result[0], torch.mm(*call.tensors))


@pytest.mark.parametrize("fault", ["a bit", "a length", "an error"])
def test_a_record_that_does_not_is_dropped_and_the_result_is_right(call, fault, monkeypatch):
    finish = Tape.finish

    def wrong(tape, result):
        record = finish(tape, result)

        def planted(stream, *tensors):
            if fault == "an error":
                raise RuntimeError("no such argument")
            y, none = record(stream, *tensors)
            y.view(torch.int32)[0, 0] ^= fault == "a bit"
            return [y, none][: 1 if fault == "a length" else 2]

        return planted

    monkeypatch.setattr(Tape, "finish", wrong)
    result = observe(call, lambda: compute(call))
    assert torch.equal(result[0], torch.mm(*call.tensors))
    assert records._records[KEY] == "it does not have the bits of the recorded call"
    assert Call(KEY, call.tensors).record is None


def test_what_writes_to_its_operands_is_not_repeated(monkeypatch):
    gpu = types.SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert records._can_repeat(Call(("lora_linear_forward",), [gpu]))
    assert not records._can_repeat(Call(("add_lora",), [gpu]))
    assert not records._can_repeat(Call(("lora_linear_forward",), [torch.ones(1)]))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not records._can_repeat(Call(("lora_linear_forward",), [gpu]))


def test_one_thread_records_at_a_time(call):
    other = Call((*KEY, "other"), call.tensors)
    records._records[other.key] = None
    done = []

    def second():
        done.append(observe(other, lambda: compute(other))[0])

    def first():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return compute(call)

    observe(call, first)
    assert torch.equal(done[0], torch.mm(*call.tensors))
    assert callable(records._records[KEY])
    assert records._records[other.key] is None  # its next call is recorded
