"""A name server for tests: answers each question for an IPv4 address of NAME with ADDRESS.

python3 name_server.py NAME ADDRESS listens on 127.0.0.1, UDP port 53.
"""

import socket
import struct
import sys


def question(query):
    """Returns the name of a query, and the bytes of its question."""
    labels, position = [], 12
    while query[position]:
        end = position + 1 + query[position]
        labels.append(query[position + 1 : end].decode())
        position = end
    return ".".join(labels), query[12 : position + 5]


def response(query, name, address):
    asked, asked_bytes = question(query)
    is_known = asked.lower() == name
    has_address = is_known and asked_bytes.endswith(b"\0\1\0\1")
    flags = 0x8180 if is_known else 0x8183
    head = query[:2] + struct.pack(">HHHHH", flags, 1, int(has_address), 0, 0)
    record = b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 60, 4) + socket.inet_aton(address)
    return head + asked_bytes + (record if has_address else b"")


def main():
    name, address = sys.argv[1:]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        while True:
            query, client = server.recvfrom(4096)
            server.sendto(response(query, name, address), client)


if __name__ == "__main__":
    main()
