"""GPU, shared memory, disk, limits and network of this machine."""

from __future__ import annotations

import resource
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from refine_verl.data.cache import default_cache_dir
from refine_verl.doctor.findings import FAIL, OK, WARN, Finding

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NEEDED = 2 * GIB
"""Ray keeps its object store there. Containers get 64 MB unless told otherwise."""
DISK_NEEDED = 2 * GIB
DISK_WANTED = 20 * GIB
FILES_NEEDED = 1024
FILES_WANTED = 8192
"""Ray opens several files and sockets per worker."""
CAPABILITY_NEEDED = (8, 0)
"""Ampere: the first with bf16 matrix products."""
GPU_MEMORY_WANTED = 24 * GIB


def check_gpu() -> Iterator[Finding]:
    """Each visible GPU can do bf16 and has memory; none at all is fine, but said."""
    import torch

    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        name, memory, capability = f"GPU {index}", f"{gpu.total_memory / GIB:.0f} GiB", f"{gpu.major}.{gpu.minor}"
        seen = f"{gpu.name}, {memory}, compute capability {capability}, CUDA {torch.version.cuda}"
        if (gpu.major, gpu.minor) < CAPABILITY_NEEDED:
            yield Finding(name, FAIL, f"{seen}: no bf16", "use Ampere or later, or the CPU: CUDA_VISIBLE_DEVICES=")
        elif gpu.total_memory < GPU_MEMORY_WANTED:
            fix = "enough for small models only; python -m refine_verl.plan says what a run needs"
            yield Finding(name, WARN, seen, fix)
        else:
            yield Finding(name, OK, seen)


def _no_gpu(cuda: str | None) -> Finding:
    if not shutil.which("nvidia-smi"):
        return Finding("GPU", OK, "none: models run on the CPU kernels")
    if cuda is None:
        seen = "there is a driver (nvidia-smi), but torch is a CPU build"
        return Finding("GPU", FAIL, seen, "install a CUDA build of torch")
    fix = "run nvidia-smi: is the driver recent enough for this CUDA, is CUDA_VISIBLE_DEVICES empty, was the container "
    fix += "started with --gpus?"
    return Finding("GPU", FAIL, f"there is a driver, but torch (CUDA {cuda}) sees no GPU", fix)


def check_shared_memory() -> Iterator[Finding]:
    """/dev/shm holds Ray's object store."""
    if not SHARED_MEMORY.is_dir():
        yield Finding("shared memory", OK, f"no {SHARED_MEMORY} on this system; Ray uses /tmp")
        return
    size = shutil.disk_usage(SHARED_MEMORY).total
    seen = f"{SHARED_MEMORY} has {size / GIB:.1f} GiB"
    if size < SHARED_MEMORY_NEEDED:
        fix = "start the container with --shm-size=16g, or: mount -o remount,size=16G /dev/shm"
        yield Finding("shared memory", WARN, f"{seen}; Ray falls back to /tmp, which is slow", fix)
    else:
        yield Finding("shared memory", OK, seen)


def check_disk() -> Iterator[Finding]:
    """Room for checkpoints (here) and for tokenised documents (the cache directory)."""
    for name, path in (("disk, working directory", Path.cwd()), ("disk, data.cache_dir", default_cache_dir())):
        place = next(place for place in (path, *path.parents) if place.exists())
        free = shutil.disk_usage(place).free
        seen = f"{free / GIB:.1f} GiB free at {path}"
        fix = "free some, or set trainer.default_local_dir and data.cache_dir to another disk"
        status = FAIL if free < DISK_NEEDED else WARN if free < DISK_WANTED else OK
        yield Finding(name, status, seen, "" if status == OK else fix)


def check_open_files() -> Iterator[Finding]:
    """The limit of open files (ulimit -n)."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        yield Finding("open files", OK, "no limit")
        return
    status = FAIL if limit < FILES_NEEDED else WARN if limit < FILES_WANTED else OK
    fix = "" if status == OK else "ulimit -n 65536 (in a container: --ulimit nofile=65536)"
    yield Finding("open files", status, f"at most {limit}", fix)


def check_localhost() -> Iterator[Finding]:
    """`localhost` is this machine and takes connections: Ray's processes and gloo talk over it."""
    try:
        with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()[:2], 5):
            port = server.getsockname()[1]
    except OSError as error:
        fix = "add `127.0.0.1 localhost` to /etc/hosts; let the firewall pass the loopback interface; unset http_proxy"
        yield Finding("localhost", FAIL, f"cannot connect to itself: {error}", fix)
        return
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        fix = f"add `127.0.0.1 {socket.gethostname()}` to /etc/hosts"
        yield Finding("localhost", WARN, f"the host's name {socket.gethostname()} does not resolve", fix)
        return
    yield Finding("localhost", OK, f"connected over port {port}")
