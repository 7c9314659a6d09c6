# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Arrays and streams of other libraries: DLPack in and out, and steps in the caller's stream."""

from __future__ import annotations

import gc
import sys
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

import mrv1.cuda
from mrv1 import _core, memory
from mrv1.errors import ClosedError, DeviceError, InvalidArgumentError
from serving_tools import VOCAB, greedy, make_prompt, open_runner, run_to_end

DL_CPU, DL_CUDA = 1, 2
NUMPY = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture
def torch(device: str) -> ModuleType:
    """torch for the device; these tests run where it is installed."""
    module = pytest.importorskip("torch")
    if device == "cuda" and not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return module


def doubling(
    device: _core.Device, dtype: str, tokens: int = 4
) -> tuple[_core.ProgramSession, int, int]:
    """A session whose output is twice its input: [tokens, 8]."""
    program = _core.Program(dtype)
    x = program.input("x", 8)
    out = program.add(x, x)
    program.output(out)
    return _core.ProgramSession(device, program, max_tokens=tokens), x, out


def on_device(values: np.ndarray, device: _core.Device) -> _core.DeviceArray:
    """Values in pinned memory, as an array that the device addresses."""
    array = memory.pinned(values.shape, values.dtype, device)
    array.numpy()[...] = values
    return array.device()


def to_host(array: _core.DeviceArray, device: _core.Device) -> np.ndarray:
    """What an array of a float session holds, by way of a session that takes it."""
    session, x, _ = doubling(device, array.dtype, max(1, array.shape[0]))
    session.set_value(x, array)
    return session.value(x, array.shape[0])


def run_tokens(**options: object) -> list[int | None]:
    with open_runner("cuda", **options) as runner:
        return [output.token_id for output in run_to_end(runner, make_prompt(9, 1), greedy(6))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_in_and_out(native_device: _core.Device, dtype: str) -> None:
    session, x, out = doubling(native_device, dtype)
    values = np.arange(32, dtype=np.float32).reshape(4, 8).astype(NUMPY[dtype])
    session.set_value(x, on_device(values, native_device))
    session.run(1, 4)
    assert (session.value(out, 4) == 2 * values.astype(np.float32)).all()
    result = session.device_value(out, 4)
    assert (result.shape, result.dtype, result.nbytes) == (
        (4, 8),
        dtype,
        32 * NUMPY[dtype].itemsize,
    )
    # A copy: the session goes on, and ends, without it.
    session.set_value(x, on_device(0 * values, native_device))
    session.run(1, 4)
    session.close()
    del session
    gc.collect()
    assert (to_host(result, native_device) == 2 * values.astype(np.float32)).all()
    empty = doubling(native_device, dtype)[0].device_value(x, 0)
    assert empty.shape == (0, 8) and empty.nbytes == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_in(native_device: _core.Device, dtype: str) -> None:
    program = _core.Program("bfloat16")
    x = program.input("x", 8)
    weight = program.weight("m", False, 8, [("a", 3), ("b", 5)])
    out = program.linear(x, weight)
    program.output(out)
    session = _core.ProgramSession(native_device, program)
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    kind = {"float16": np.dtype(np.float16)}.get(dtype) or NUMPY[dtype]
    session.load_weight(weight, on_device(values.astype(kind), native_device))
    one_hot = np.zeros(8, np.float32)
    one_hot[3] = 1.0
    session.set_value(x, one_hot)
    session.run(1, 1)
    assert (session.value(out, 1)[0] == values[:, 3]).all()


def test_what_is_refused(native_device: _core.Device) -> None:
    session, x, _ = doubling(native_device, "bfloat16")
    rows = np.zeros((4, 8), ml_dtypes.bfloat16)
    with pytest.raises(InvalidArgumentError, match=r"\[set_value\].*bfloat16"):
        session.set_value(x, on_device(rows.astype(np.float16), native_device))
    with pytest.raises(InvalidArgumentError, match=r"\[set_value\] 40 values"):
        session.set_value(x, on_device(np.zeros((5, 8), ml_dtypes.bfloat16), native_device))
    with pytest.raises(InvalidArgumentError, match=r"\[set_value\].*__dlpack__"):
        session.set_value(x, object())
    with pytest.raises(InvalidArgumentError, match=r"\[load_weight\].*float16"):
        session.load_weight(0, on_device(np.zeros(8, np.int32), native_device))
    closed = memory.pinned(8, "bfloat16", native_device)
    closed.close()
    with pytest.raises(ClosedError):
        closed.device()


def test_memory_of_the_wrong_device(native_device: _core.Device, device: str) -> None:
    class Elsewhere:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (DL_CUDA, 0) if device == "cpu" else (DL_CUDA, 7)

        def __dlpack__(self, **_: object) -> object:
            raise AssertionError("the array must be refused before it is asked for")

    session, x, _ = doubling(native_device, "float32")
    with pytest.raises(InvalidArgumentError, match=r"\[set_value\].*lies on DLPack device"):
        session.set_value(x, Elsewhere())


def test_the_protocol(native_device: _core.Device, device: str) -> None:
    session, _, out = doubling(native_device, "float32")
    session.run(1, 4)
    for array in (on_device(np.zeros(3, np.float32), native_device), session.device_value(out, 4)):
        assert array.__dlpack_device__() == (DL_CPU if device == "cpu" else DL_CUDA, 0)
        assert '"dltensor"' in repr(array.__dlpack__())
        assert '"dltensor_versioned"' in repr(array.__dlpack__(max_version=(1, 0)))
        assert '"dltensor"' in repr(array.__dlpack__(max_version=(0, 8)))
        with pytest.raises(BufferError):
            array.__dlpack__(copy=True)
        with pytest.raises(BufferError):
            array.__dlpack__(dl_device=(DL_CUDA, 5))
        array.__dlpack__(stream=None, copy=False, dl_device=array.__dlpack_device__())
        if device == "cpu":
            with pytest.raises(InvalidArgumentError, match=r"\[dlpack\] stream = 1"):
                array.__dlpack__(stream=1)
        else:
            for stream in (-1, 1, 2, native_device.stream):
                array.__dlpack__(stream=stream)
            for wrong in (0, -2):
                with pytest.raises(InvalidArgumentError, match=r"\[dlpack\] stream"):
                    array.__dlpack__(stream=wrong)


def test_cuda_array_interface(native_device: _core.Device, device: str) -> None:
    array = on_device(np.zeros((2, 3), np.int16), native_device)
    if device == "cpu":
        assert not hasattr(array, "__cuda_array_interface__")
        return
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3),
        "typestr": "<i2",
        "data": (array.ptr, False),
        "version": 3,
        "strides": None,
        "stream": None,
    }
    session, x, _ = doubling(native_device, "float32")
    written = session.device_value(x, 4)
    assert written.__cuda_array_interface__["stream"] == native_device.stream
    assert not hasattr(
        on_device(np.zeros(2, ml_dtypes.bfloat16), native_device), "__cuda_array_interface__"
    )


def test_numpy_takes_arrays_of_the_cpu(device: str, native_device: _core.Device) -> None:
    if device != "cpu":
        pytest.skip("NumPy takes memory of the CPU only")
    array = memory.pinned((2, 3), "float32", native_device)
    taken = np.from_dlpack(array.device())
    array.numpy()[:] = 5.0
    array.close()
    del array
    gc.collect()
    assert taken.shape == (2, 3) and (taken == 5.0).all()


def test_logits_stay_as_they_were(device: str) -> None:
    with open_runner(device) as runner:
        prompt = make_prompt(9, 1)
        row = runner.add_row(prompt, greedy(4), block_ids=[1, 2, 3, 4])
        runner.execute([(row, len(prompt))]).result()
        first, copied = runner.logits(0), runner.device_logits(0)
        runner.execute([(row, 1)]).result()
        second = runner.logits(0)
        assert (first != second).any()
        assert copied.shape == (VOCAB,) and copied.dtype == "float32"
        with pytest.raises(InvalidArgumentError, match="logits"):
            runner.device_logits(1)
    host = _core.Device(device, num_threads=1)
    program = _core.Program("float32")
    x = program.input("x", VOCAB)
    program.output(program.add(x, x))
    session = _core.ProgramSession(host, program)
    session.set_value(x, copied)
    assert (session.value(x, 1)[0] == first).all()


def test_streams_of_the_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("for the CPU")
    native = _core.Device("cpu", num_threads=1)
    with pytest.raises(InvalidArgumentError, match="no CUDA stream"):
        native.stream  # noqa: B018
    with pytest.raises(InvalidArgumentError, match="stream"):
        _core.Device("cpu", num_threads=1, stream=5)
    with pytest.raises(InvalidArgumentError, match="stream"):
        open_runner("cpu", stream=5)
    assert native.ordinal == 0


def test_default_streams_are_refused(device: str) -> None:
    if device != "cuda":
        pytest.skip("for GPUs")
    for stream in (0, 1, 2):
        with pytest.raises(InvalidArgumentError, match="default stream"):
            _core.Device("cuda", stream=stream)


def test_torch_takes_and_gives(torch: ModuleType, native_device: _core.Device, device: str) -> None:
    session, x, out = doubling(native_device, "bfloat16")
    values = torch.arange(32, device=device).reshape(4, 8).to(torch.bfloat16)
    session.set_value(x, values)
    session.run(1, 4)
    result = torch.from_dlpack(session.device_value(out, 4))
    session.close()
    assert result.device.type == device
    assert torch.equal(result, 2 * values)
    session, x, out = doubling(native_device, "bfloat16")
    with pytest.raises(InvalidArgumentError, match="contiguous"):
        session.set_value(x, values.t())
    pinned = memory.pinned((3, 4), "bfloat16", native_device)
    shared = torch.from_dlpack(pinned.device())
    with pinned.write() as array:
        array[:] = 3.0
    assert (shared == 3).all()
    shared += 1
    pinned.fence(torch.cuda.current_stream().cuda_stream if device == "cuda" else None)
    pinned.wait()
    assert (pinned.numpy() == 4).all()
    pinned.close()
    del pinned
    gc.collect()
    assert (shared == 4).all()


def test_torch_waits_for_the_step_and_the_step_for_torch(
    torch: ModuleType, native_device: _core.Device, device: str
) -> None:
    session, x, out = doubling(native_device, "float32", tokens=1 << 16)
    side = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(side):
        for number in range(1, 4):
            values = torch.zeros(1 << 16, 8, device=device)
            for _ in range(200):
                values += number
            session.set_value(x, values)
            session.run(1, 1 << 16)
            result = torch.from_dlpack(session.device_value(out, 1 << 16))
            assert (result == 400 * number).all()


def test_steps_run_in_the_stream_of_the_caller(torch: ModuleType, device: str) -> None:
    if device != "cuda":
        pytest.skip("for GPUs")
    stream = torch.cuda.Stream()

    class Holder:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, stream.cuda_stream)

    holder = Holder()
    references = sys.getrefcount(holder)
    native = _core.Device("cuda", stream=holder)
    assert native.stream == stream.cuda_stream
    assert native.__cuda_stream__() == (0, stream.cuda_stream)
    assert sys.getrefcount(holder) > references
    session, x, out = doubling(native, "float32")
    with torch.cuda.stream(stream):
        values = torch.full((4, 8), 3.0, device="cuda")
        session.set_value(x, values)
        session.run(1, 4)
        assert (torch.from_dlpack(session.device_value(out, 4)) == 6).all()
    session.close()
    native.close()
    del session, native
    gc.collect()
    assert sys.getrefcount(holder) == references
    stream.synchronize()  # it was not ours to destroy
    plain = run_tokens()
    assert run_tokens(stream=stream.cuda_stream) == run_tokens(stream=holder) == plain


def test_cuda_core_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    for call in (mrv1.cuda.devices, mrv1.cuda.create_stream, mrv1.cuda.current_stream):
        with pytest.raises(DeviceError, match=r'pip install "mrv1\[cuda\]"'):
            call()


def test_cuda_core(device: str) -> None:
    pytest.importorskip("cuda.core", exc_type=ImportError)
    if device == "cpu":
        if not _core.cuda_available():
            with pytest.raises(DeviceError, match="cuda.core"):
                mrv1.cuda.devices()
        return
    found = mrv1.cuda.devices()
    native = _core.Device("cuda")
    free, total = native.memory()
    assert found[0].ordinal == 0
    assert found[0].name == native.name
    assert found[0].total_bytes == total
    assert abs(found[0].free_bytes - free) < 1 << 30
    assert found[0].compute_capability >= (7, 0)
    stream = mrv1.cuda.create_stream()
    own = _core.Device("cuda", stream=stream)
    assert own.stream == int(stream.handle)
    session, x, out = doubling(own, "float32")
    session.set_value(x, np.ones((4, 8), np.float32))
    session.run(1, 4)
    assert (session.value(out, 4) == 2).all()
    memory.pinned(3, "int32", native).fence(stream)
    memory.pinned(3, "int32", native).fence(mrv1.cuda.current_stream())
    with pytest.raises(InvalidArgumentError, match="default stream"):
        _core.Device("cuda", stream=mrv1.cuda.current_stream())
    for call in (mrv1.cuda.create_stream, mrv1.cuda.current_stream):
        with pytest.raises(InvalidArgumentError, match="ordinal = 99"):
            call(99)
