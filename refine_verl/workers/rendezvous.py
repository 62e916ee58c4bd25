"""Where the ranks of a run find each other: on the loopback interface if all of them are on this machine."""

from __future__ import annotations

import os
import socket
from ipaddress import ip_address

import torch.distributed as dist
from verl.utils.device import get_device_name, get_nccl_backend
from verl.utils.distributed import initialize_global_process_group_ray


def join_process_group() -> None:
    """Make the process group of all ranks; does nothing where there is one.

    Ray and verl have set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. torch's store listens on all interfaces
    whatever MASTER_ADDR says, and takes orders from whoever connects; if that is a loopback address, it is given a
    socket that is bound to it. DIST_INIT_METHOD, where it is set, says how to meet instead.
    """
    if dist.is_initialized():
        return
    device = get_device_name()
    # verl would ask for "cpu:gloo,cpu:gloo", which torch refuses
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{get_nccl_backend()}"
    address = os.environ.get("MASTER_ADDR", "")
    if os.environ.get("DIST_INIT_METHOD") or not _is_loopback(address):
        initialize_global_process_group_ray(backend=backend)
        return
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    dist.init_process_group(backend, store=_store(address, port, rank, world_size), rank=rank, world_size=world_size)


def _store(address: str, port: int, rank: int, world_size: int) -> dist.Store:
    # the store closes the socket when it goes
    listener = socket.create_server((address, port)).detach() if rank == 0 else None
    return dist.TCPStore(address, port, world_size, is_master=rank == 0, master_listen_fd=listener)


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False
