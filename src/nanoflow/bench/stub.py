"""An endpoint of known latency: it computes nothing and streams tokens at times that are known beforehand.

Measuring it shows what the load generator itself adds. Run as `python -m nanoflow.bench.stub --ttft-ms 50`; it prints
its URL. The whole of an answer's schedule follows from the moment its request was read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator

from nanoflow.bench.load import Heard

MODEL = "stub"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"  # a chunked answer needs no length


class Schedule:
    """First token after `ttft_s`, another every `tpot_s`."""

    def __init__(self, ttft_s: float, tpot_s: float) -> None:
        self.ttft_s = ttft_s
        self.tpot_s = tpot_s

    async def tokens(self, n_tokens: int, from_s: float) -> AsyncIterator[int]:
        """Yields each token's number when its time (`time.monotonic()`) has come."""
        for number in range(n_tokens):
            delay = from_s + self.ttft_s + number * self.tpot_s - time.monotonic()
            if delay > 0:
                await asyncio.sleep(delay)
            yield number

    def latency_s(self, n_tokens: int) -> float:
        """From the request to its last token."""
        return self.ttft_s + (n_tokens - 1) * self.tpot_s


class StubTarget:
    """The schedule as a target in this process."""

    name = "stub in process"

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def prepare(self, prompt: list[int], max_tokens: int, seed: int) -> int:
        """How many tokens to send."""
        return max_tokens

    async def send(self, request: int, heard: Heard) -> None:
        """Hear the tokens at their times."""
        async for _ in self._schedule.tokens(request, time.monotonic()):
            heard.tokens(1)


class StubServer:
    """The schedule behind HTTP: `/v1/models` and streamed `/v1/completions`."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    async def start(self, port: int = 0) -> asyncio.Server:
        """Listen on 127.0.0.1; port 0 takes a free one."""
        return await asyncio.start_server(self._connection, "127.0.0.1", port)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            while await self._request(reader, writer):
                pass
        writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        read_s = time.monotonic()
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        body = await reader.readexactly(int(fields.get("content-length", 0)))
        if head.startswith("GET"):
            _send(writer, HEAD % b"application/json", json.dumps({"data": [{"id": MODEL}]}).encode())
        else:
            await self._completion(writer, json.loads(body), read_s)
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _completion(self, writer: asyncio.StreamWriter, body: dict[str, object], read_s: float) -> None:
        n_tokens = int(str(body["max_tokens"]))
        writer.write(HEAD % b"text/event-stream")
        async for number in self._schedule.tokens(n_tokens, read_s):
            reason = "length" if number == n_tokens - 1 else None
            _send(writer, b"", _event({"choices": [{"index": 0, "text": " a", "finish_reason": reason}]}))
            await writer.drain()
        prompt = body["prompt"]
        usage = {"prompt_tokens": len(prompt) if isinstance(prompt, list) else 0, "completion_tokens": n_tokens}
        _send(writer, b"", _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")


def _event(value: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _send(writer: asyncio.StreamWriter, head: bytes, chunk: bytes) -> None:
    writer.write(head + b"%x\r\n%s\r\n" % (len(chunk), chunk))


async def _serve(schedule: Schedule, port: int) -> None:
    server = await StubServer(schedule).start(port)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description="an endpoint of known latency")
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--tpot-ms", type=float, default=10.0)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(Schedule(args.ttft_ms / 1e3, args.tpot_ms / 1e3), args.port))


if __name__ == "__main__":
    main()
