"""Compiles CUDA C++ kernels with NVRTC when they are first needed, loads and launches them.

A kernel is a file NAME.cu beside this one, with one ``extern "C"`` function NAME. It includes
nothing but the .cuh files here, and macros give its sizes. NVRTC and the bindings to NVRTC and the
driver come with torch's CUDA wheels for Linux. Importing this module works without them, and
compiling works without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from fxint4._pytorch import inductor
from fxint4.atomic_files import write_whole

__all__ = [
    "Kernel",
    "architecture",
    "build",
    "compiled",
    "fingerprint",
    "in_context",
    "needed",
    "version",
]

logger = logging.getLogger("fxint4")

Macros = tuple[tuple[str, int], ...]

_OPTIONS = ("-std=c++17",)
#: The first driver version that has dependent launches in CUDA graphs: 12.3.
_CAPTURES_DEPENDENT = 12030
#: Bytes of shared memory that a block may have without a function attribute.
_USUAL_SHARED = 48 * 2**10


@functools.cache
def _bindings() -> tuple[Any, Any, str] | str:
    """The modules for NVRTC and the driver, and NVRTC's version; or why one is missing."""
    try:
        # Import statements would give other types where these are installed than where not.
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        driver = importlib.import_module("cuda.bindings.driver")
        _, major, minor = nvrtc.nvrtcVersion()  # the first call looks for the library
    except (ImportError, OSError, RuntimeError) as error:
        logger.debug("no CUDA C++ kernels, Triton's are taken instead: %s", error)
        return str(error)
    return nvrtc, driver, f"{major}.{minor}"


def version() -> str | None:
    """The version of NVRTC, such as "13.0"; None if NVRTC or the bindings are missing."""
    found = _bindings()
    return None if isinstance(found, str) else found[2]


@functools.cache
def architecture(major: int, minor: int) -> str | None:
    """NVRTC's target for GPUs of a compute capability; None if none of its targets runs there.

    It is "sm_90a", with Hopper's own instructions, for 9.0. Otherwise it is the capability itself
    or, if NVRTC does not know that, the first of its major number. (No other minor number would do:
    code for 8.7 and 10.1, say, runs nowhere else.)
    """
    found = _bindings()
    if isinstance(found, str):
        return None
    _, known = found[0].nvrtcGetSupportedArchs()
    fit = [each for each in (10 * major + minor, 10 * major) if each in known]
    return f"sm_{fit[0]}{'a' if fit[0] == 90 else ''}" if fit else None


@functools.cache
def fingerprint() -> str:
    """A hash of the kernels' sources and of NVRTC's version, for the names of cubins on disk."""
    facts = (sorted(_sources().items()), _OPTIONS, version())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@functools.cache
def _sources() -> Mapping[str, bytes]:
    """The contents of the .cu and .cuh files, by name."""
    files = resources.files(__package__).iterdir()
    return {file.name: file.read_bytes() for file in files if file.name.endswith((".cu", ".cuh"))}


@functools.cache
def compiled(name: str, macros: Macros, target: str) -> bytes:
    """The cubin of a kernel, kept in Inductor's cache folder. For the arguments see `build`."""
    digest = hashlib.sha256(repr((fingerprint(), macros, target)).encode()).hexdigest()[:32]
    file = f"fxint4-{name}-{digest}.cubin"
    try:
        return (inductor.cache_folder() / file).read_bytes()
    except OSError:
        cubin, _ = build(name, macros, target)
    try:
        folder = inductor.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / file, cubin)
    except OSError as error:
        logger.debug("%s is compiled again in the next process: %s", name, error)
    return cubin


def build(name: str, macros: Macros, target: str, further: Sequence[str] = ()) -> tuple[bytes, str]:
    """Compile a kernel.

    Args:
        name: The name of its file without the suffix.
        macros: Names and values.
        target: See `architecture`.
        further: More options for NVRTC.

    Returns:
        The cubin, and NVRTC's log.

    Raises:
        RuntimeError: NVRTC is missing, or does not compile the source; the message then has
            NVRTC's log.
    """
    nvrtc, _, number = needed()
    headers = {file: text for file, text in _sources().items() if file.endswith(".cuh")}
    file, defined = f"{name}.cu", [f"-D{macro}={value}" for macro, value in macros]
    options = [f"-arch={target}", *_OPTIONS, *defined, *further]
    _, program = nvrtc.nvrtcCreateProgram(
        _sources()[file],
        file.encode(),
        len(headers),
        list(headers.values()),
        [header.encode() for header in headers],
    )
    try:
        (result,) = nvrtc.nvrtcCompileProgram(
            program, len(options), [option.encode() for option in options]
        )
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        written = bytes(size)
        nvrtc.nvrtcGetProgramLog(program, written)
        log = written.rstrip(bytes(1)).decode(errors="replace")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(
                f"NVRTC {number} does not compile {file} with {' '.join(options)} "
                f"({result.name}); the option kernel='triton' does without it:\n{log}"
            )
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        cubin = bytes(size)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin, log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def needed() -> tuple[Any, Any, str]:
    """The modules for NVRTC and the driver, and NVRTC's version.

    Raises:
        RuntimeError: One is missing.
    """
    found = _bindings()
    if isinstance(found, str):
        raise RuntimeError(
            f"this int4 matmul needs NVRTC and cuda-bindings ({found}): torch's CUDA wheels "
            "for Linux bring them; otherwise install cuda-bindings and NVRTC for CUDA "
            f"{torch.version.cuda}, or leave the option kernel='cuda' out"
        )
    return found


class Kernel:
    """A kernel that is loaded on one device.

    Args:
        name: See `build`.
        macros: See `build`.
        device: A CUDA device with its index.
        threads: Threads of a block.
        shared: Bytes of dynamic shared memory of a block.

    Raises:
        RuntimeError: NVRTC is missing or does not compile it, or the driver refuses it.
    """

    def __init__(
        self,
        name: str,
        macros: Macros,
        device: torch.device,
        threads: int,
        shared: int,
    ) -> None:
        self._name, self._device, self._threads, self._shared = name, device, threads, shared
        _, self._driver, number = needed()
        capability = torch.cuda.get_device_capability(device)
        self._can_depend = capability >= (9, 0) and (
            self._checked(self._driver.cuDriverGetVersion()) >= _CAPTURES_DEPENDENT
        )
        target = architecture(*capability)
        if target is None:
            major, minor = capability
            raise RuntimeError(
                f"NVRTC {number} does not compile for compute capability {major}.{minor} of "
                f"{device}: leave the option kernel='cuda' out"
            )
        driver, cubin = self._driver, compiled(name, macros, target)
        with torch.cuda.device(device):
            _make_context_current(self._driver, self._device)
            # The module lives as long as the process: its kernels may be in CUDA graphs.
            module = self._checked(driver.cuModuleLoadData(cubin))
            self._function = self._checked(driver.cuModuleGetFunction(module, name.encode()))
            if shared > _USUAL_SHARED:
                most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._checked(driver.cuFuncSetAttribute(self._function, most, shared))

    def launch(self, programs: int, arguments: ctypes.Structure, dependent: bool = False) -> None:
        """Launches the kernel on the device's current stream.

        Args:
            programs: Blocks, along the first axis of the grid.
            arguments: The kernel's arguments, one field for each, in order.
            dependent: Whether it may start, in a CUDA graph that is being captured, while the
                kernel before it still runs ("programmatic dependent launch", compute capability 9.0
                and newer). The kernel reads its weights before it waits for the other kernel, which
                must not write them.

        Raises:
            RuntimeError: The driver refuses the launch.
        """
        start = ctypes.addressof(arguments)
        offsets = _offsets(type(arguments))
        pointers = (ctypes.c_void_p * len(offsets))(*[start + offset for offset in offsets])
        address = ctypes.addressof(pointers)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with torch.cuda.device(self._device):
            dependent = dependent and self._can_depend and torch.cuda.is_current_stream_capturing()
            launch = self._launch_dependent if dependent else self._launch
            self._checked(
                in_context(self._driver, self._device, lambda: launch(programs, stream, address))
            )

    def _launch(self, programs: int, stream: int, address: int) -> tuple[Any, ...]:
        grid, block = (programs, 1, 1), (self._threads, 1, 1)
        return self._driver.cuLaunchKernel(  # type: ignore[no-any-return]
            self._function, *grid, *block, self._shared, stream, address, 0
        )

    def _launch_dependent(self, programs: int, stream: int, address: int) -> tuple[Any, ...]:
        driver = self._driver
        attribute = driver.CUlaunchAttribute()
        attribute.id = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.value.programmaticStreamSerializationAllowed = 1
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes, config.hStream = self._shared, stream
        config.attrs, config.numAttrs = [attribute], 1
        return driver.cuLaunchKernelEx(  # type: ignore[no-any-return]
            config, self._function, address, 0
        )

    def _checked(self, returned: tuple[Any, ...]) -> Any:
        """The value that a call of the driver returned; RuntimeError if the call failed."""
        result, *values = returned
        if result != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(
                f"the CUDA kernel {self._name} on {self._device}: {result.name}; the option "
                "kernel='triton' does without it"
            )
        return values[0] if values else None


def in_context(driver: Any, device: torch.device, call: Callable[[], Any]) -> Any:
    """The result of a driver call that needs a context, as the tuple that it returns.

    A thread that has called torch does not always have a current context. If it has none, the
    device's context is made current and the call repeated.
    """
    returned = call()
    if returned[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        _make_context_current(driver, device)
        returned = call()
    return returned


def _make_context_current(driver: Any, device: torch.device) -> None:
    """Makes the device's primary context, which torch uses, current in this thread."""
    result, number = driver.cuDeviceGet(device.index)
    if result == driver.CUresult.CUDA_SUCCESS:
        result, context = driver.cuDevicePrimaryCtxRetain(number)
    if result == driver.CUresult.CUDA_SUCCESS:
        (result,) = driver.cuCtxSetCurrent(context)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{device} has no CUDA context: {result.name}")


@functools.cache
def _offsets(arguments: type[ctypes.Structure]) -> tuple[int, ...]:
    """The offsets of the fields, in bytes."""
    return tuple(getattr(arguments, name).offset for name, *_ in arguments._fields_)
