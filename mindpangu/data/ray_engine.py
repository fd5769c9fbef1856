"""The stages of curation on Ray Data, over the machines of a Ray cluster. All of them have to see run.root."""

import functools
import logging
import os
import pickle

import numpy as np

from .dedup import equal_keys, link_runs
from .engine import cut, sign_piece

_BUCKETS_PER_CPU = 4  # of the shuffle by band keys


class RayEngine:
    """As engine.Local, on the Ray cluster that RAY_ADDRESS names, or one that is started on this machine with num_cpus.

    Pieces whose worker process or machine is lost are done again. Raises ImportError where Ray is missing.
    """

    workers = None  # of this machine

    def __init__(self, num_cpus):
        # Or MindSpore, which a training imports after its curation, finds an implementation that refuses its files.
        os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
        try:
            import ray
            import ray.data
        except ImportError:
            raise ImportError("curate.engine=ray needs Ray Data: pip install 'mindpangu[ray]'.") from None
        self._ray, self._num_cpus = ray, num_cpus

    def __enter__(self):
        ray = self._ray
        self._ours = not ray.is_initialized()
        if self._ours:
            here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": self._num_cpus, "include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="error", **here)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        return self

    def __exit__(self, *_):
        if self._ours:
            self._ray.shutdown()

    def ahead(self, function, *arguments):
        """As engine.Local with one process: here, when it is waited for."""
        return functools.partial(function, *arguments)

    def map_batches(self, function, batches):
        """As engine.Local with one process: files are read on the machine that has them."""
        yield from map(function, batches)

    def map(self, function, pool, pieces):
        """Yields function(pool, piece) for each piece, in their order."""
        pieces = list(pieces)
        if not pieces:
            return

        def work(row):
            return {"result": pickle.dumps(function(pool, pickle.loads(row["piece"])))}

        for row in self._rows(pieces).map(work).iter_rows():
            yield pickle.loads(row["result"])

    def link(self, documents, settings, scratch, on_done):
        """As engine.Local.link, by a shuffle of the bands' keys; only links come back."""
        pieces = cut(documents)
        firsts = np.cumsum([0, *(piece.size for piece in pieces)])[:-1]
        num_buckets = _BUCKETS_PER_CPU * max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        pool = documents.pool

        def sign_all(batch):
            columns = {"bucket": [], "key": [], "place": []}
            for packed in batch["piece"]:
                first, numbers = pickle.loads(packed)
                signed_D, keys_BD = sign_piece(settings, pool, numbers)
                for band, keys_D in enumerate(keys_BD):
                    # Keys of different bands must not meet.
                    columns["key"].append(keys_D ^ np.uint64(band * 0x9E3779B97F4A7C15 % (1 << 64)))
                    columns["place"].append(signed_D + first)
            keys = np.concatenate(columns["key"])
            return {"bucket": (keys >> np.uint64(32)) % np.uint64(num_buckets), "key": keys,
                    "place": np.concatenate(columns["place"])}

        def meet(batch):
            order = np.argsort(batch["place"], kind="stable")
            keys, places = batch["key"][order], batch["place"][order]
            members, starts = equal_keys(keys)
            sizes = np.diff(np.append(starts, members.size))
            return {"left": places[np.repeat(members[starts], sizes)], "right": places[members]}

        keys = self._rows(list(zip(firsts.tolist(), pieces, strict=True))).map_batches(sign_all, batch_size=1)
        links = keys.groupby("bucket", num_partitions=num_buckets).map_groups(meet, batch_format="numpy")
        components = np.arange(len(documents.numbers))
        for batch in links.iter_batches(batch_size=None, batch_format="numpy"):
            pairs = np.stack([batch["left"], batch["right"]], 1).astype(np.int64)
            components = link_runs(components, pairs.reshape(-1), np.arange(0, pairs.size, 2))
        on_done(len(documents.numbers))
        return components

    def _rows(self, pieces):
        return self._ray.data.from_items([{"piece": pickle.dumps(piece)} for piece in pieces],
                                         override_num_blocks=len(pieces))
