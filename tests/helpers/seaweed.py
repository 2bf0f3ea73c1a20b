"""A real S3 for tests: SeaweedFS (`weed mini`), one server process on free loopback ports.

    with SeaweedS3.running(tmp_path) as s3:
        bucket = s3.bucket()            # made on the server, a fresh name each time
        client = S3RemoteStore.open(..., endpoint_url=s3.endpoint)

`pause`/`resume` stop and continue the process (a silent server that still accepts connections);
`kill` ends it at once. Only the process that this object started is ever signalled.
"""

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tests.helpers.ports import free_port

WEED = Path(sys.executable).with_name("weed")
READY_SECONDS = 60.0
ACCESS_KEY = "test-access"
SECRET_KEY = "test-secret"

_IDENTITIES = {
    "identities": [
        {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": "reader-access", "secretKey": "reader-secret"}],
            "actions": ["Read", "List"],
        },
    ]
}


class SeaweedS3:
    access_key = ACCESS_KEY
    secret_key = SECRET_KEY
    region = "us-east-1"

    def __init__(self, directory: Path, process: subprocess.Popen[bytes], *, port: int) -> None:
        self.directory = directory
        self.port = port
        self._process = process
        self._buckets = itertools.count(1)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    @contextlib.contextmanager
    def running(cls, directory: Path) -> Iterator[Self]:
        """Started and answering; ended, with its files, on leaving."""
        last: Exception | None = None
        for _ in range(3):  # a port found free may be taken by the time the server binds it
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            port, process = _start(directory)
            server = cls(directory, process, port=port)
            try:
                server._wait_ready()
            except RuntimeError as error:
                server.kill()
                last = error
                continue
            try:
                yield server
            finally:
                server.kill()
                shutil.rmtree(directory, ignore_errors=True)
            return
        raise RuntimeError("SeaweedFS does not start") from last

    def environment(self) -> dict[str, str]:
        """The credentials as the SDK's own chain reads them."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REGION": self.region,
        }

    def bucket(self) -> str:
        """A new, empty bucket's name."""
        name = f"bucket-{os.getpid()}-{next(self._buckets)}"
        self._make_bucket(name)
        return name

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()

    def _make_bucket(self, name: str) -> None:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest("PUT", f"{self.endpoint}/{name}", data=b"")
        SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", self.region).add_auth(request)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("PUT", f"/{name}", headers=dict(request.headers))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"bucket {name}: {answer.status} {body!r}")

    def _wait_ready(self) -> None:
        """Ready when it can write: the volume server joins some time after S3 answers."""
        deadline = time.monotonic() + READY_SECONDS
        problem: Exception | None = None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                log = (self.directory / "weed.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS ended with {self._process.returncode}: {log}")
            try:
                self._make_bucket("ready")
                self._write_once()
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                problem = error
                time.sleep(0.05)
            else:
                return
        raise RuntimeError("SeaweedFS does not answer") from problem

    def _write_once(self) -> None:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest("PUT", f"{self.endpoint}/ready/object", data=b"x")
        S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", self.region).add_auth(request)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("PUT", "/ready/object", body=b"x", headers=dict(request.headers))
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"cannot write yet: {answer.status}")


def _start(directory: Path) -> tuple[int, subprocess.Popen[bytes]]:
    master, volume, filer, s3 = (free_port() for _ in range(4))
    config = directory / "s3.json"
    config.write_text(json.dumps(_IDENTITIES))
    data = directory / "data"
    data.mkdir()
    arguments = [
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={s3}",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={config}",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        "-volume.max=10000",
        "-volume.preStopSeconds=0",
    ]
    with (directory / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            [str(WEED), "mini", *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"HOME": str(directory), "PATH": os.environ.get("PATH", "")},
            start_new_session=True,
        )
    return s3, process
