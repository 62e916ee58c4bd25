"""On which addresses processes listen."""

from __future__ import annotations

import ipaddress

import psutil


def listening(pid: int) -> dict[str, str]:
    """Address and port -> name of the process, for a process and all below it."""
    found = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            name, connections = process.name(), process.net_connections("inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN:
                found[f"{connection.laddr.ip} {connection.laddr.port}"] = name
    return found


def is_loopback(place: str) -> bool:
    """Whether an address and port of ``listening`` can be reached from this machine only."""
    return ipaddress.ip_address(place.split()[0].removeprefix("::ffff:")).is_loopback
