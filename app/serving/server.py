"""The process's HTTP server: ends in order, keeps its connections within limits, and has a port of
its own for operators where that is asked for.
"""

import asyncio
import functools
import gc
import resource
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from app.core.base.clock import SystemRandomness
from app.core.base.events import Events
from app.routers.deps import Desk
from app.serving.protocol import ConnectionLimits, GuardedProtocol
from app.settings import Settings

TICKS_A_SECOND = 10  # uvicorn's
DESCRIPTORS_WANTED = 65_536
"""For connections, segments, cached files; the shell's usual soft limit is 1,024."""


def raise_descriptor_limit() -> None:
    """The soft limit, as far as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_WANTED if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


COLLECT_AFTER = (10_000, 20, 20)
"""Objects made and not yet freed, then rounds of the younger generation (`gc.set_threshold`)."""


def spare_the_collector() -> None:
    """What starting made stays for good: the collector need not look at it again.

    It is a hundred thousand objects and more, routes and schemas for the most part, and a look at
    all of them stops the process for a tenth of a second. Requests make hardly any cycles, but
    many at once have more objects in flight than the usual threshold: without this, collections
    took half of a small append's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


class OrderlyServer(uvicorn.Server):
    """Ends in order on a signal or a fatal error, and returns instead of re-raising the signal."""

    def __init__(self, app: FastAPI, settings: Settings, *, events: Events) -> None:
        limits = ConnectionLimits(
            connections_max=settings.connections_max,
            head_bytes_max=settings.max_head_bytes,
            head_fields_max=settings.max_head_fields,
            head_timeout_seconds=settings.head_timeout_seconds,
            answer_stall_seconds=settings.answer_stall_seconds,
        )
        self._new_protocol = functools.partial(
            GuardedProtocol, limits=limits, events=events, randomness=SystemRandomness()
        )
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                loop="uvloop",
                http=self._new_protocol,  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(settings.trusted_proxies),
                forwarded_allow_ips=list(settings.trusted_proxies),
                timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
            )
        )
        self.failed = False
        self._desk: Desk = app.state.desk
        self._desk.metrics.watch_connections(lambda: len(self.server_state.connections))
        self._settings = settings
        self._events = events

    def fail(self, error: BaseException) -> None:
        del error
        self.failed = True
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal that was asked for is no failure, so it is not raised again at the end."""
        del frame
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._settings.admin_port is not None:
            await self._open_admin_port(self._settings.admin_port)
        spare_the_collector()

    async def _open_admin_port(self, port: int) -> None:
        settings = self._settings
        host = settings.admin_host or settings.host
        try:
            self.servers.append(
                await asyncio.get_running_loop().create_server(
                    self._make_protocol, host=host, port=port
                )
            )
        except OSError as error:
            self._events.error("service.start_refused", detail=f"BOP_ADMIN_PORT={port}: {error}")
            self.fail(error)
        else:
            self._events.info("service.admin_port", host=host, port=port)

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_A_SECOND == 0:
            now = asyncio.get_running_loop().time()
            for connection in tuple(self.server_state.connections):
                if isinstance(connection, GuardedProtocol):
                    connection.look(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Readiness goes down and long polls end before connections are waited for."""
        self._desk.begin_shutdown()
        await super().shutdown(sockets)

    def _make_protocol(self) -> asyncio.Protocol:
        return self._new_protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
