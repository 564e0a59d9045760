"""Asks a server for /health again and again, from a process of its own: what it sees is the server's delay alone.

Prints the seconds that each answer took, a line for each.
"""

import http.client
import sys
import time

INTERVAL = 0.02  # seconds between an answer and the next question


def main(host: str, port: int) -> None:
    """Runs until it is ended."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    while True:
        asked = time.monotonic()
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        sys.stdout.write(f"{time.monotonic() - asked}\n")
        sys.stdout.flush()
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
