"""The real service and bare ceilings as subprocesses, each with its peak memory."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@asynccontextmanager
async def running(*arguments: str, port: int, env: dict[str, str] | None = None, path: str = "/"):
    """A python subprocess that answers HTTP on `port`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env={**os.environ, **(env or {})},
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(600):
                try:
                    if (await client.get(path)).status_code < 500:
                        break
                except httpx.TransportError:
                    pass
                if process.returncode is not None:
                    raise RuntimeError(f"{arguments} ended with {process.returncode}")
                await asyncio.sleep(0.05)
            else:
                raise RuntimeError(f"{arguments} did not come up")
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 40)
            except TimeoutError:
                process.kill()
                await process.wait()


@asynccontextmanager
async def service(data_dir: Path, **settings: str):
    """The service on a free port; settings as BOP_… names without the prefix."""
    port = free_port()
    env = {
        "BOP_DATA_DIR": str(data_dir),
        "BOP_PORT": str(port),
        "BOP_LOG_LEVEL": "warning",
        "BOP_CHECKPOINT_INTERVAL_SECONDS": "0",
        **{f"BOP_{name.upper()}": value for name, value in settings.items()},
    }
    async with running(
        "-m", "app.cli.main", "serve", port=port, env=env, path="/readyz"
    ) as process:
        yield port, process


def peak_rss_mib(process: asyncio.subprocess.Process) -> float:
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM")


def cpu_seconds(process: asyncio.subprocess.Process) -> float:
    """User's and system's, of the process with its threads."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS
