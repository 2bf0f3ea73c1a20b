"""The container image. It is built for real where the tools are (the long size); linted always."""

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.helpers.ports import free_port
from tests.helpers.wait import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
BASE, IMAGE = "localhost/bop-base:test", "localhost/bop-checkpoint:test"
MACHINE_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
STORAGE = ("--storage-driver", "vfs")


def run(*command: str, timeout: float = 600) -> str:
    ran = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout[-1500:]}{ran.stderr[-3000:]}"
    return ran.stdout.strip()


def test_dockerfile_is_clean():
    run(str(Path(sys.executable).with_name("hadolint")), "Dockerfile")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Built on a base made from the machine's own Debian mirror."""
    missing = [each for each in ("buildah", "podman", "debootstrap") if not shutil.which(each)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    root = tmp_path_factory.mktemp("base")
    run("debootstrap", "--variant=minbase", "--include=ca-certificates,python3,python3-venv",
        "bookworm", str(root / "rootfs"))  # fmt: skip
    # Whom this machine trusts, the build trusts too.
    shutil.copy(MACHINE_CERTIFICATES, root / "rootfs" / MACHINE_CERTIFICATES.relative_to("/"))
    (root / "rootfs/etc/pip.conf").write_text(f"[global]\ncert = {MACHINE_CERTIFICATES}\n")
    run("tar", "-C", str(root / "rootfs"), "-cf", str(root / "base.tar"), ".")
    run("podman", *STORAGE, "import", str(root / "base.tar"), BASE)
    run("buildah", *STORAGE, "bud", "--isolation", "chroot", "--network", "host",
        "--build-arg", f"BASE={BASE}", "--tag", IMAGE, ".")  # fmt: skip
    return IMAGE


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_image_answers_healthz_and_runs_as_nobody(image: str, tmp_path: Path):
    container = run("buildah", *STORAGE, "from", image)
    try:
        inside = ("buildah", *STORAGE, "run", "--isolation", "chroot", "--user", "10001:10001")
        assert run(*inside, container, "--", "id", "-u") == "10001"
        # The failpoints' package is a test's: in the image the calls do nothing.
        run(*inside, container, "--", "/opt/bop/bin/python", "-c",
            "from app.core.base import failpoints\n"
            "import importlib.util as u; assert u.find_spec('bop_failpoints') is None\n"
            "failpoints.fp('job.before_plan')")  # fmt: skip
        assert run(
            *inside, "--env", "BOP_FAILPOINTS=job.before_plan=kill", container, "--",
            "bop-checkpoint", "serve", "--print-config",
        )  # fmt: skip
        port = free_port()
        server = await asyncio.create_subprocess_exec(
            *inside, "--env", f"BOP_PORT={port}", container, "--", "bop-checkpoint", "serve",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

                async def is_ready() -> bool:
                    try:
                        return (await client.get("/readyz")).status_code == 200
                    except httpx.TransportError:
                        return False

                await wait_until(is_ready, timeout=60, describe=lambda: "the image's service")
                assert (await client.get("/healthz")).status_code == 200
                assert b"SwaggerUIBundle" in (await client.get("/docs/swagger-ui.js")).content
        finally:
            server.terminate()
            await server.wait()
    finally:
        run("buildah", *STORAGE, "rm", container)
