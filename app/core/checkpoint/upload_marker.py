"""Persists which blobs are confirmed, so that a resumed job uploads only the others."""

from app.core.checkpoint.intents import marked_uploaded, progress_of
from app.core.checkpoint.job_hold import JobHold


class UploadMarker:
    """Uploads that end together share a commit."""

    def __init__(self, hold: JobHold) -> None:
        self._hold = hold
        self._done: set[int] = set()
        self._writing = False

    async def uploaded(self, chunk_id: int) -> None:
        self._done.add(chunk_id)
        self._hold.touch()
        if self._writing:
            return  # the one that writes looks again
        self._writing = True
        try:
            while self._done:
                done, self._done = self._done, set()
                intents = marked_uploaded(self._hold.job.intents, done)
                total_bytes = self._hold.job.progress.total_bytes
                await self._hold.update(
                    reason="checkpoint.uploading",
                    changes={
                        "intents": intents,
                        "progress": progress_of(intents, total_bytes=total_bytes),
                    },
                )
        finally:
            self._writing = False
