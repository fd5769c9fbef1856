"""A model's responses on disk, so that a killed evaluation that is started again answers only what is missing."""

import fcntl
import json
import os
from pathlib import Path

import xxhash


class ResponseFile:
    """Responses of one model in a file that only grows: a line {"key", "response"} each.

    Lines are written whole, synced and under a lock: what a kill cut off is dropped when the file is opened next, and
    several evaluations of a model may share the file.
    """

    def __init__(self, path):
        self.path, self._responses = Path(path), {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            data = file.read()
            whole = data.rfind(b"\n") + 1
            file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._responses[entry["key"]] = entry["response"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path}:{number} is no response: delete the file to answer anew.") from None

    def __len__(self):
        return len(self._responses)

    def get(self, key):
        """The response to a request, or None."""
        return self._responses.get(key)

    def add(self, responses):
        """Add {key: response}: on disk when this returns."""
        lines = "".join(json.dumps({"key": key, "response": response}) + "\n" for key, response in responses.items())
        with open(self.path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        self._responses.update(responses)


def request_key(kind, *parts):
    """What identifies a request to a model: a hash over its kind and what the response depends on."""
    return xxhash.xxh3_128_hexdigest(json.dumps([kind, *parts], sort_keys=True).encode())
