"""Plans a corpus with a progress display: walking through thousands of tars takes a while."""

from __future__ import annotations

from pipelines.corpus.plan import Plan, plan_corpus
from pipelines.progress import meter


def planned(corpus: str, *, gzip_tars: bool = False) -> Plan:
    """See `plan_corpus`."""
    with meter("planning", "input shards") as show:
        return plan_corpus(corpus, lambda done, total: show(done, total), gzip_tars=gzip_tars)
