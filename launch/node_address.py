"""Print under which address, and at which network interface, this machine reaches the first one:
``node_address.py MASTER_ADDR MASTER_PORT [NODE_ADDR]``.

Host names will not do: many machines' own names lead to 127.0.1.1 or nowhere. The interface's line
is empty where it has no IPv4 address.
"""

import fcntl
import socket
import struct
import sys

# linux/sockios.h
SIOCGIFADDR = 0x8915


def own_address(host: str, port: int) -> str:
    """The address that packets to ``host`` come from; nothing is sent."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def interface_of(address: str) -> str:
    """The interface with this IPv4 address, "" if none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(
                    probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode())
                )
            # an interface without an IPv4 address
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""


if __name__ == "__main__":
    try:
        address = sys.argv[3] if len(sys.argv) > 3 else own_address(sys.argv[1], int(sys.argv[2]))
    except (OSError, ValueError) as error:
        sys.exit(
            f"error: MASTER_ADDR={sys.argv[1]} MASTER_PORT={sys.argv[2]} cannot be reached "
            f"from this machine ({error}); MASTER_ADDR is the first machine's "
            "name or address in the network"
        )
    print(address)
    print(interface_of(address))
