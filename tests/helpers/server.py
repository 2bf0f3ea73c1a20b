"""The real service in a process of its own, to be used, killed, stopped and started again."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx

from tests.helpers.failpoints import Failpoints, failpoint_environment
from tests.helpers.launch import Launched, Launcher
from tests.helpers.ports import free_port
from tests.helpers.wait import wait_until

READY_SECONDS = 30.0
EXIT_SECONDS = 30.0
_LOG_TAIL_BYTES = 8000

Wait = Literal["ready", "alive", "launched"]

DEFAULTS: Mapping[str, str] = {
    "BOP_CHECKPOINT_INTERVAL_SECONDS": "0",
    "BOP_MANIFEST_MAP_BYTES": str(256 * 1024 * 1024),
    "BOP_JOB_BACKOFF_BASE_SECONDS": "0.05",
    "BOP_LOG_LEVEL": "info",
}
"""Quiet and quick: checkpoints only on demand, retries without long waits."""


class ServerEnded(AssertionError):
    """The process ended while it was expected to serve."""


class ServerProcess:
    """`async with ServerProcess(…) as server:` starts it, and leaves no process behind.

    `settings` are environment variables over DEFAULTS; `failpoints` arm the next start only
    through `start` and `restart`.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        launcher: Launcher,
        settings: Mapping[str, str] | None = None,
        failpoints: Failpoints | None = None,
        trace: Path | None = None,
        log_path: Path | None = None,
    ) -> None:
        self.data_dir = data_dir
        self.log_path = log_path or data_dir.with_name(f"{data_dir.name}.log")
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.settings = {
            **DEFAULTS,
            "BOP_DATA_DIR": os.fspath(data_dir),
            "BOP_HOST": "127.0.0.1",
            "BOP_PORT": str(self.port),
            **(settings or {}),
        }
        self._launcher = launcher
        self._failpoints = failpoints or {}
        self._trace = trace
        self._process: Launched | None = None
        self._client: httpx.AsyncClient | None = None

    def __repr__(self) -> str:
        state = "not started" if self._process is None else f"pid {self._process.pid}"
        code = self.exit_code
        return f"<ServerProcess {self.base_url} {state}{'' if code is None else f' exit {code}'}>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    # --- the process

    async def start(
        self,
        *,
        wait: Wait = "ready",
        failpoints: Failpoints | None = None,
        arguments: tuple[str, ...] = ("serve",),
        timeout: float = READY_SECONDS,
    ) -> None:
        """Raises ServerEnded, with the end of its log, if it ends before it serves."""
        assert not self.is_running, "it runs already"
        if failpoints is not None:
            self._failpoints = failpoints
        self._process = self._launcher.launch(
            arguments,
            environment=self.settings | failpoint_environment(self._failpoints, trace=self._trace),
            log=self.log_path,
            cwd=self.log_path.parent,
        )
        await self._new_client()
        if wait != "launched":
            await self.wait_serving("/readyz" if wait == "ready" else "/healthz", timeout=timeout)

    async def restart(self, *, wait: Wait = "ready", failpoints: Failpoints | None = None) -> None:
        """Ends it in order if it still runs, and starts it on the same data directory and port."""
        if self.is_running:
            await self.terminate()
        await self.start(wait=wait, failpoints=failpoints)

    async def wait_serving(self, path: str = "/readyz", *, timeout: float = READY_SECONDS) -> None:
        async def serves() -> bool:
            if (code := self.exit_code) is not None:
                raise ServerEnded(f"exit {code} before {path} answered 200\n{self.log_tail()}")
            try:
                return (await self.client.get(path)).status_code == 200
            except httpx.TransportError:
                return False

        await wait_until(
            serves, timeout=timeout, describe=lambda: f"{path} of {self!r}\n{self.log_tail()}"
        )

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was never started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def wait_exit(self, *, timeout: float = EXIT_SECONDS) -> int:
        """The exit code, negative for a signal."""
        await wait_until(
            lambda: not self.is_running,
            timeout=timeout,
            describe=lambda: f"the end of {self!r}\n{self.log_tail()}",
        )
        code = self.exit_code
        assert code is not None
        return code

    async def kill9(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        await self.wait_exit()

    async def terminate(self, *, timeout: float = EXIT_SECONDS) -> int:
        os.kill(self.pid, signal.SIGTERM)
        return await self.wait_exit(timeout=timeout)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def rss_bytes(self) -> int:
        return self._status_bytes("VmRSS")

    def rss_peak_bytes(self) -> int:
        return self._status_bytes("VmHWM")

    def log_tail(self) -> str:
        if not self.log_path.exists():
            return "(no log)"
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    async def aclose(self) -> None:
        if self.is_running:
            if "COVERAGE_PROCESS_CONFIG" in os.environ:  # what ran is written at an orderly end
                self.resume()
                await self.terminate()
            else:
                await self.kill9()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    # --- HTTP

    @property
    def client(self) -> httpx.AsyncClient:
        assert self._client is not None, "it was never started"
        return self._client

    async def _new_client(self) -> None:
        if self._client is not None:
            await self._client.aclose()
        self._client = httpx.AsyncClient(base_url=self.base_url, timeout=30.0, trust_env=False)

    def _status_bytes(self, field: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
