"""Plans a corpus with a progress display: walking through thousands of tars takes a while."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.corpus.grouping import FURTHER_IMAGE
from pipelines.corpus.plan import Plan, plan_corpus
from pipelines.progress import meter
from pipelines.results import say


def planned(corpus: str, *, gzip_tars: bool = False) -> Plan:
    """See `plan_corpus`."""
    with meter("planning", "input shards") as show:
        plan = plan_corpus(corpus, lambda done, total: show(done, total), gzip_tars=gzip_tars)
    say(_passed_over(plan))
    return plan


def _passed_over(plan: Plan) -> Iterator[str]:
    """What somebody may have meant to be read."""
    if tars := plan.skipped.get("tar: .tar"):
        yield (
            f"{plan.corpus}: holds images and {tars:,} tars, and of these the images are read only. For the tars, name them: "
            f"'{plan.corpus.rstrip('/')}/*.tar'"
        )
    if images := plan.unused.get(FURTHER_IMAGE):
        yield f"{plan.corpus}: {images:,} images are not used, each a further one of its sample: of several the first plain one is taken"
