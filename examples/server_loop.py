# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""The engine in an asyncio program: a stream for each client, priorities, clients that go away.

python examples/server_loop.py [model directory]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections.abc import AsyncGenerator

from mrv1 import Engine, RequestUpdate, SamplingParams
from mrv1.shapes import demo_model

URGENT, NORMAL = -1, 0


class Server:
    """Clients of one event loop over an engine, whose updates come from its output thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._names = itertools.count()

    async def stream(
        self, prompt: str, params: SamplingParams, *, priority: int = NORMAL
    ) -> AsyncGenerator[RequestUpdate, None]:
        """Yields the updates of a request; whoever stops reading aborts it."""
        updates: asyncio.Queue[RequestUpdate] = asyncio.Queue()

        def callback(update: RequestUpdate) -> None:
            # On the output thread: hand it over and return.
            self._loop.call_soon_threadsafe(updates.put_nowait, update)

        name = str(next(self._names))
        self._engine.add_request(name, prompt, params, priority=priority, callback=callback)
        finished = False
        try:
            while not finished:
                update = await updates.get()
                finished = update.finished
                yield update
        finally:
            if not finished:
                self._engine.abort(name, report=False)


async def client(server: Server, prompt: str, priority: int, patience: int) -> str:
    """Reads a text, but no more than `patience` updates of it."""
    params = SamplingParams(temperature=0.0, max_tokens=40)
    text = prompt
    stream = server.stream(prompt, params, priority=priority)
    async for update in stream:
        text += update.text
        patience -= 1
        if patience == 0:
            text += " ... [client gone]"
            break
    await stream.aclose()
    return text


async def serve(engine: Engine) -> None:
    """Runs some clients at the same time."""
    server = Server(engine)
    texts = await asyncio.gather(
        client(server, "Once upon a time", NORMAL, 1000),
        client(server, "The little dog", URGENT, 1000),
        client(server, "One day, a girl named Lily", NORMAL, 8),
    )
    print("\n\n".join(texts))


def main() -> None:
    """Serves three clients, one of which goes away."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", nargs="?", default=demo_model(), help="model directory")
    model = parser.parse_args().model
    with Engine(model, max_num_seqs=2) as engine:
        asyncio.run(serve(engine))
        engine.check_idle()


if __name__ == "__main__":
    main()
